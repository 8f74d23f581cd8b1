"""The members that change a layer's form: which weights it has then, and of what size.

For a layer y = W x + b with W of `[out, in]`, sigma the member's non-linearity (Sparse-IFT,
section 2.2; Low Rank: App. C.3.3):

| member     | form                      | size                                           | sparse |
|------------|---------------------------|------------------------------------------------|--------|
| parallel   | sum_j sigma(W_j x)        | branches k_sp = 1 / (1 - s)                    | W_j    |
| factorized | V sigma(U x)              | inner d_sf = in out / ((in + out) (1 - s))     | U, V   |
| doped      | V (U x) + sigma(W x)      | inner d_sd = s in out / (in + out)             | W      |
| low_rank   | V sigma(U x)              | inner d = in out / (k_lr (in + out))           | none   |

U is `[size, in]`, V `[out, size]`; the bias is added once, at the end. Low Rank stands in a model
whose widths are k_lr times the base model's, in and out being the base layer's: the paper prints
k_lr in the numerator, which would cost k_lr^2 times the dense layer's FLOPs that it equates.

Pure arithmetic: `layer_weights` is what the module is built of and what the ledger counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from sparse_gpt.ift.wide import exact

MAX_BRANCHES = 1_000  # of a parallel layer: each is a module of its own
FORMS = ("parallel", "factorized", "doped", "low_rank")
NON_LINEARITIES = ("identity", "relu", "gelu")
# Variance of a standard normal truncated at 2 std, as weights are drawn.
TRUNCATED_VARIANCE = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a layer: `[out, in]`, and whether it is one that can be sparse."""

    shape: tuple[int, int]
    sparse: bool = True

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Transform:
    """Which layers of a model have another form.

    `sizes`: by layer (`h.0.attn.q`, ...), the number of branches (parallel) or the inner width
    (all others). Layers that are not named are plain. Raises `ValueError` for a member,
    non-linearity or size that does not exist.
    """

    member: str
    non_linearity: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.member not in FORMS:
            raise ValueError(f"member {self.member!r} is none of {', '.join(FORMS)}")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"non_linearity {self.non_linearity!r} is none of {', '.join(NON_LINEARITIES)}"
            )
        if not isinstance(self.sizes, Mapping):
            raise ValueError(f"sizes {self.sizes!r} is not a mapping from layers to numbers")
        least = 0 if self.member == "doped" else 1
        most = MAX_BRANCHES if self.member == "parallel" else 2**30
        for layer, size in self.sizes.items():
            if type(size) is not int or size < least:
                raise ValueError(f"{self.member} {layer}: size {size!r:.40} is not {least} or more")
            if size > most:
                raise ValueError(f"{self.member} {layer}: size {size:.3g} is more than {most}")


def layer_weights(member: str, size: int, shape: tuple[int, int]) -> dict[str, LayerWeight]:
    """The weights of a transformed layer of `[out, in]`, by their names below the layer's."""
    out, inner = shape
    if member == "parallel":
        return {f"branch.{j}.weight": LayerWeight(shape) for j in range(size)}
    sparse = member == "factorized"
    factors = {
        "u.weight": LayerWeight((size, inner), sparse),
        "v.weight": LayerWeight((out, size), sparse),
    }
    if member == "doped":
        # d_sd = 0 (s = 0): no low-rank part at all.
        return {**(factors if size else {}), "sparse.weight": LayerWeight(shape)}
    return factors


def weights_of(
    transform: Transform | None, layer: str, shape: tuple[int, int]
) -> dict[str, LayerWeight]:
    """As `layer_weights`, of a layer by name; a plain layer has the one sparse `weight`."""
    if transform is None or layer not in transform.sizes:
        return {"weight": LayerWeight(shape)}
    return layer_weights(transform.member, transform.sizes[layer], shape)


def layer_of(weight: str) -> str:
    """The layer a weight belongs to: `h.0.attn.q` of `h.0.attn.q.branch.1.weight`."""
    return ".".join(weight.split(".")[:4])


def drawn_as(weight: str) -> str:
    """The name by which a weight is drawn at initialisation.

    The first branch of Parallel and the sparse weight of Doped are drawn as the dense layer's
    weight, so that at s = 0 they are the dense layer bit for bit.
    """
    layer = layer_of(weight)
    first = weight in (f"{layer}.branch.0.weight", f"{layer}.sparse.weight")
    return f"{layer}.weight" if first else weight


def solve_size(
    member: str,
    sparsity: float | Fraction,
    shape: tuple[int, int],
    base_shape: tuple[int, int] | None = None,
    multiple_of: int = 1,
) -> int:
    """The size at which a layer of `[out, in]` has the FLOPs of the dense layer of `base_shape`.

    The nearest integer, ties up; an inner width the nearest multiple of `multiple_of`, at least
    one of them (Doped: none at s = 0). `base_shape` is another shape for Low Rank alone, in
    a widened model, where `sparsity` is 0.
    """
    density = 1 - exact(sparsity)
    if not 0 < density <= 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    if member == "parallel":
        return max(1, math.floor(1 / density + Fraction(1, 2)))
    base_out, base_in = base_shape or shape
    rank = Fraction(base_out * base_in, sum(shape))
    if member == "doped":
        return multiple_of * math.floor(rank * (1 - density) / multiple_of + Fraction(1, 2))
    return multiple_of * max(1, math.floor(rank / density / multiple_of + Fraction(1, 2)))


def solve_units(
    weights: Mapping[str, LayerWeight], macs: int, block_size: int = 1
) -> dict[str, int]:
    """Active blocks of each sparse weight of a layer, so that it has `macs` MACs a token.

    What dense weights leave of `macs`, to the nearest block (ties down), is shared among the
    sparse weights by their sizes (largest remainder, ties to the first). This pays back what the
    rounding of the size costs. At least one block of each stays, at most all.
    """
    units = {name: w.numel // block_size for name, w in weights.items() if w.sparse}
    left = macs - sum(w.numel for w in weights.values() if not w.sparse)
    every = sum(units.values())
    total = min(every, max(len(units), -(-(2 * left - block_size) // (2 * block_size))))
    wanted = {name: Fraction(total * count, every) for name, count in units.items()}
    kept = {name: max(1, math.floor(share)) for name, share in wanted.items()}
    by_remainder = sorted(units, key=lambda name: kept[name] - wanted[name])
    for name in by_remainder[: max(0, total - sum(kept.values()))]:
        kept[name] += 1
    return kept


def weight_std(member: str, size: int, shape: tuple[int, int], weight: str, std: float) -> float:
    """Standard deviation to draw `weight` (`u.weight`, ...) of a transformed layer with.

    The paper says none for these members. It is the one at which the layer's output, sigma being
    the identity, has the variance of the dense layer drawn with `std` (Doped's two parts together),
    with U and V drawn alike. With r = in out / (in + out) and active shares 1 - s = 1 / k_sp
    (parallel), r / d_sf (factorized), 1 - d_sd / r (doped):

    - `branch.*`, `sparse`: std.
    - `u`, `v`: std_f^4 = std^2 d / (r^2 t) (factorized), std^2 / (r t) (doped), std^2 / (d t)
      (low_rank), t = 0.774 being the variance that truncation at 2 std leaves.
    """
    if weight not in ("u.weight", "v.weight"):
        return std
    rank = shape[0] * shape[1] / sum(shape)
    inner = {"factorized": rank**2 / size, "doped": rank, "low_rank": size}[member]
    return (std**2 / (inner * TRUNCATED_VARIANCE)) ** 0.25
