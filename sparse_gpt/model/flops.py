"""The FLOPs ledger: Table 17 of the papers, in exact integers.

Forward FLOPs of one sequence of S tokens, for L layers of width d and feed-forward width f with
h heads and a vocabulary of V (FACTS section 3):

    L [ rho (8 S d^2 + 4 S d f) + 4 S^2 d + 3 h S^2 ] + 2 S d V

rho is the share of active weights in the sparsified layers; here it is a count of active weights,
so nothing is rounded. 3 h S^2 is the softmax. Embedding look-ups, biases, LayerNorms and GELU do
not count, causal attention is not halved, the head is dense, backward is twice forward.

Where the tied embedding has a width e of its own (`d_embed`), the head costs 2 S e V, and two
dense projections, e -> d behind the look-up and d -> e before the head, 2 S e d each.

A layer that a Sparse-IFT member gave another form counts every weight it has; the member's
non-linearity and its sums do not count, as GELU does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from sparse_gpt.ift.forms import LayerWeight, Transform, weights_of
from sparse_gpt.ift.wide import exact

LAYERS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2")


def layer_shapes(dims: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """`(out, in)` of every linear layer of the blocks, by name: `h.0.attn.q`, ..."""
    d, f = dims["d_model"], dims["d_ff"]
    shapes = {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    return {
        f"h.{block}.{layer}": shapes.get(layer, (d, d))
        for block in range(dims["n_layer"])
        for layer in LAYERS
    }


def linear_weights(
    dims: Mapping[str, int], transform: Transform | None = None
) -> dict[str, LayerWeight]:
    """Every weight of the blocks' linear layers, by name.

    `h.0.attn.q.weight`, ...; of a transformed layer `h.0.attn.q.branch.0.weight`, ...
    """
    return {
        f"{layer}.{name}": weight
        for layer, shape in layer_shapes(dims).items()
        for name, weight in weights_of(transform, layer, shape).items()
    }


def linear_shapes(
    dims: Mapping[str, int], transform: Transform | None = None
) -> dict[str, tuple[int, int]]:
    """`(out, in)` of every weight that can be sparse, by name: `h.0.attn.q.weight`, ..."""
    weights = linear_weights(dims, transform)
    return {name: weight.shape for name, weight in weights.items() if weight.sparse}


def kept_units(units: int, sparsity: float) -> int:
    """How many of `units` weights or blocks stay at a sparsity: (1 - s) n, at least one.

    Rounded to nearest (half to even) on the exact decimal.
    """
    return max(1, round((1 - exact(sparsity)) * units))


def active_counts(
    dims: Mapping[str, int],
    sparsity: float,
    block: tuple[int, int] = (1, 1),
    transform: Transform | None = None,
) -> dict[str, int]:
    """Active weights of every layer at a uniform sparsity, in whole blocks.

    `kept_units` of each layer's blocks: the count a topology keeps.
    """
    size = block[0] * block[1]
    return {
        name: size * kept_units(out * inner // size, sparsity)
        for name, (out, inner) in linear_shapes(dims, transform).items()
    }


@dataclass(frozen=True)
class SequenceFlops:
    """Forward FLOPs of one sequence by part, over all layers."""

    qkvo: int
    mlp: int
    scores: int  # q k^T and the weighted sum of v
    softmax: int
    head: int
    projections: int = 0  # between the width of the model and that of its embedding

    @property
    def forward(self) -> int:
        layers = self.qkvo + self.mlp + self.scores + self.softmax
        return layers + self.head + self.projections

    @property
    def backward(self) -> int:
        return 2 * self.forward

    @property
    def total(self) -> int:
        """Forward and backward: what Table 17 prints."""
        return self.forward + self.backward


def sequence_flops(
    dims: Mapping[str, int],
    seq_len: int,
    vocab_size: int,
    active: Mapping[str, int] | None = None,
    transform: Transform | None = None,
) -> SequenceFlops:
    """FLOPs of one sequence of `seq_len` tokens.

    `active` maps weight names to counts of active weights (`active_counts`, or a topology's
    own); a weight left out is dense, and so is the whole model without it. `transform`: the form
    of layers that are not plain. Raises `ValueError` for a name that is no weight of the model or
    a count that it cannot hold.
    """
    counts = {name: weight.numel for name, weight in linear_weights(dims, transform).items()}
    for name, count in (active or {}).items():
        if name not in counts or not 0 <= count <= counts[name]:
            raise ValueError(f"{count} active weights in {name}: not a layer that can hold them")
        counts[name] = count
    attention = sum(count for name, count in counts.items() if ".attn." in name)
    d, d_embed = dims["d_model"], dims.get("d_embed")
    return SequenceFlops(
        qkvo=2 * seq_len * attention,
        mlp=2 * seq_len * (sum(counts.values()) - attention),
        scores=dims["n_layer"] * 4 * seq_len**2 * d,
        softmax=dims["n_layer"] * 3 * dims["n_head"] * seq_len**2,
        head=2 * seq_len * (d_embed or d) * vocab_size,
        projections=2 * 2 * seq_len * d * d_embed if d_embed else 0,
    )


def dense_gradient_extra(
    dims: Mapping[str, int],
    seq_len: int,
    active: Mapping[str, int],
    transform: Transform | None = None,
) -> int:
    """FLOPs a sequence costs more on a step whose weight gradients are dense (RigL's updates).

    Forward and dX stay sparse; dW is 2 S out in per sparse layer in place of 2 S per active
    weight. `active` as for `sequence_flops`; layers left out are dense already.
    """
    weights = linear_weights(dims, transform)
    dense = sum(weights[name].numel for name in active)
    return 2 * seq_len * (dense - sum(active.values()))


@dataclass(frozen=True)
class FlopsLedger:
    """What the steps of a run cost, in exact integers.

    `active` counts the sparse products only, `dense` what the masked kernel computes: every
    product in full. `dense_gradient` is the extra of one sequence on a dense-gradient step.
    `seq_len` in tokens, `sparse` weights in the layers that can be sparse.
    """

    active: SequenceFlops
    dense: SequenceFlops
    dense_gradient: int
    seq_len: int
    sparse: int

    @classmethod
    def of(
        cls,
        dims: Mapping[str, int],
        seq_len: int,
        vocab_size: int,
        active: Mapping[str, int] | None = None,
        transform: Transform | None = None,
    ) -> "FlopsLedger":
        """The ledger of a model; `active` and `transform` as for `sequence_flops`."""
        weights = linear_weights(dims, transform)
        return cls(
            active=sequence_flops(dims, seq_len, vocab_size, active, transform),
            dense=sequence_flops(dims, seq_len, vocab_size, None, transform),
            dense_gradient=dense_gradient_extra(dims, seq_len, active or {}, transform),
            seq_len=seq_len,
            sparse=sum(weights[name].numel for name in active or {}),
        )

    def sequence(self, active: int, trained: int) -> int:
        """FLOPs of one sequence with so many active weights in the sparse layers, and gradients
        of so many: forward and dX are 2 S per active weight, dW is 2 S per trained one."""
        sparse = 2 * active + trained - 3 * self.sparse
        return self.dense.total + 2 * self.seq_len * sparse


def steps_for_tokens(tokens: int, batch: int, seq_len: int) -> int:
    """Optimizer steps of `batch` sequences that see at least `tokens` tokens: the ceiling."""
    return -(-tokens // (batch * seq_len))


def fraction_of_steps(fraction: float, steps: int) -> int:
    """`ceil(fraction * steps)` on the exact decimal, so that 0.07 * 100 is 7."""
    product: Fraction = exact(fraction) * steps
    return -(-product.numerator // product.denominator)


# Dense peak TFLOP/s of a device, from the makers' data sheets, by a part of the device's name.
# The first match counts: longer names stand before the names they contain.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250.0, "tf32": 1125.0, "fp32": 75.0},
    "H200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "GH200": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.2},
    "H100 NVL": {"bf16": 835.0, "tf32": 417.5, "fp32": 60.0},
    "H100": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "A800": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "L40S": {"bf16": 362.05, "tf32": 183.0, "fp32": 91.6},
    "A40": {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A10": {"bf16": 125.0, "tf32": 62.5, "fp32": 31.2},
    "L4": {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of a device for `bf16`, `tf32` or `fp32`; None where it is not known."""
    if precision not in ("bf16", "tf32", "fp32"):
        raise ValueError(f"precision {precision!r} is none of bf16, tf32, fp32")
    words = device_name.replace("-", " ")
    for part, peaks in PEAK_TFLOPS.items():
        if f" {part} " in f" {words} ":
            return peaks[precision] * 1e12
    return None


def mfu(flops_per_token: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation in [0, 1]; `peak` in FLOP/s of all devices together, None unknown."""
    return None if peak is None else flops_per_token * tokens_per_second / peak
