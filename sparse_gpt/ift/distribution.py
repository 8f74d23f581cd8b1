"""How a number of units is shared out among the sparse layers: uniform, Erdos-Renyi, fixed ones.

A unit is a weight or a block. Every rule keeps the total exactly: shares are rounded by the
largest remainder, layers that would overflow are full, and what they cannot take goes to the rest.
A linear layer costs FLOPs in proportion to its active weights whatever its shape, so with the
total a model's FLOPs stay too.
"""

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

from sparse_gpt.errors import UserError

RULES = ("uniform", "erdos_renyi")


def distribute(
    shapes: Mapping[str, tuple[int, ...]],
    total: int,
    block: tuple[int, int] = (1, 1),
    rule: str = "uniform",
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Units of every layer, `total` in all, at least one each; in the order of `shapes`.

    `shapes`: `(out, in)` of the weights, by name, of convolutions with their kernel behind;
    `fixed`: layers whose counts are given, which the others make up for. `uniform` keeps the same
    share of every layer, `erdos_renyi` at most all and else a share in proportion to
    (out + in) / (out in), with kernels (out + in + h + w) / (out in h w) (RigL, section 3). Raises
    `UserError` where the others cannot make up for the fixed layers.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
    fixed = fixed or {}
    size = block[0] * block[1]
    units = {name: math.prod(shape) // size for name, shape in shapes.items()}
    rest = {name: count for name, count in units.items() if name not in fixed}
    left = total - sum(fixed[name] for name in units if name in fixed)
    if not len(rest) <= left <= sum(rest.values()):
        raise UserError(
            f"sparsity: {total:,} active units are asked for in {len(units)} layers, of which "
            f"{len(units) - len(rest)} fixed ones (dense_first, dense_last, layer_sparsity) take "
            f"{total - left:,}: {left:,} remain for {len(rest)} layers of {sum(rest.values()):,} "
            "units; fix fewer layers or change sparsity.sparsity"
        )
    weights = rest
    if rule == "erdos_renyi":
        weights = {name: sum(shapes[name]) for name in rest}
    shared = apportion(weights, rest, left)
    return {name: fixed[name] if name in fixed else shared[name] for name in units}


def apportion(weights: Mapping[str, int], caps: Mapping[str, int], total: int) -> dict[str, int]:
    """Integers of sum `total`, each in [1, cap], as near in proportion to `weights` as they can be.

    The shares are clamp(x w, 1, cap) for the one x that makes their sum right; they are rounded
    down, and the largest remainders get the units that are left, ties in the order given. Raises
    `ValueError` where no such integers exist.
    """
    if not len(caps) <= total <= sum(caps.values()):
        raise ValueError(f"{total} units do not fit {len(caps)} layers of {sum(caps.values())}")
    if not caps:
        return {}
    names = list(caps)
    # The sum is piecewise linear in x and grows; its corners are where a layer meets a bound.
    corners = sorted({Fraction(bound, weights[n]) for n in names for bound in (1, caps[n])})

    def share(name: str, x: Fraction) -> Fraction:
        return min(max(x * weights[name], Fraction(1)), Fraction(caps[name]))

    low, high = 0, len(corners) - 1  # the sum is at least `total` at `high`
    while low < high:
        middle = (low + high) // 2
        if sum(share(n, corners[middle]) for n in names) >= total:
            high = middle
        else:
            low = middle + 1
    x = corners[high]
    below = corners[high - 1] if high else x
    free = [n for n in names if share(n, below) < share(n, x)]
    if free:
        held = total - sum(share(n, below) for n in names if n not in free)
        x = Fraction(held, sum(weights[n] for n in free))
    shares = {name: share(name, x) for name in names}
    counts = {name: value.numerator // value.denominator for name, value in shares.items()}
    remainders = [(counts[n] - shares[n], i, n) for i, n in enumerate(names)]  # smallest first
    for _, _, name in heapq.nsmallest(total - sum(counts.values()), remainders):
        counts[name] += 1
    return counts
