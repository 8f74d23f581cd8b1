"""Sparse Wide: every layer's input and output widened by k_sw = sqrt(1 / (1 - s)).

A layer of D_in x D_out becomes one of (k_sw D_in) x (k_sw D_out) with sparsity s, so its active
weights, and its FLOPs, stay those of the dense layer (Sparse-IFT, section 3). Widths are integers
that the heads divide; what the rounding costs is reported by `ift.iso_flop`.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

from sparse_gpt.errors import UserError


def exact(number: float | str | Fraction) -> Fraction:
    """The rational a number is written as: 0.9 is 9/10, not the nearest double."""
    return number if isinstance(number, Fraction) else Fraction(Decimal(str(number)))


def widen(
    dims: dict[str, int],
    sparsity: float,
    heads: str = "keep",
    multiple_of: int | None = None,
) -> dict[str, int]:
    """`dims` (`n_layer, n_head, d_model, d_ff`) of the Sparse Wide model at `sparsity`.

    - `keep`: the same number of (wider) heads; d_model and d_ff go to the nearest multiple of
      n_head. This gives every published width (1092 / 4344 at 50 %, 1536 / 6144 at 75 %).
    - `fixed_d_head`: heads of the base model's width, more of them; nearest multiple of d_head.

    `multiple_of` (block sizes) makes that the nearest multiple of the least common one. Sparsity
    0 gives the dimensions back unchanged. Raises `UserError` for a sparsity outside [0, 1), an
    unknown `heads`, or a base model whose heads do not divide it.
    """
    ratio = exact(sparsity)
    if not 0 <= ratio < 1:
        raise UserError(f"ift.sparsity: {sparsity} is not in [0, 1); Sparse Wide needs s < 1")
    step = width_step(dims, heads, multiple_of)
    if ratio == 0:
        return dict(dims)
    wide = nearest_multiple(dims["d_model"], ratio, step)
    return _at(dims, heads, wide, nearest_multiple(dims["d_ff"], ratio, step))


def width_step(dims: Mapping[str, int], heads: str = "keep", multiple_of: int | None = None) -> int:
    """What the widths of a Sparse Wide model are multiples of; raises `UserError` as `widen`."""
    if heads not in ("keep", "fixed_d_head"):
        raise UserError(f"ift.heads: {heads!r} is neither 'keep' nor 'fixed_d_head'")
    if multiple_of is not None and multiple_of < 1:
        raise UserError(f"ift.multiple_of: {multiple_of} is not positive")
    n_head, d_model = dims["n_head"], dims["d_model"]
    if d_model % n_head:
        raise UserError(f"model.d_model {d_model} is not divisible by model.n_head {n_head}")
    return math.lcm(n_head if heads == "keep" else d_model // n_head, multiple_of or 1)


def with_width(
    dims: Mapping[str, int], multiple: int, heads: str = "keep", multiple_of: int | None = None
) -> dict[str, int]:
    """`dims` with d_model of `multiple` steps (`width_step`), whatever sparsity that is for.

    d_ff keeps its ratio to d_model, to the nearest step, ties up.
    """
    step = width_step(dims, heads, multiple_of)
    d_ff = Fraction(dims["d_ff"] * multiple, dims["d_model"])  # in steps
    return _at(dims, heads, multiple * step, step * max(1, math.floor(d_ff + Fraction(1, 2))))


def _at(dims: Mapping[str, int], heads: str, d_model: int, d_ff: int) -> dict[str, int]:
    n_head = dims["n_head"]
    if heads == "fixed_d_head":
        n_head = d_model // (dims["d_model"] // n_head)
    return {**dims, "n_head": n_head, "d_model": d_model, "d_ff": d_ff}


def nearest_multiple(width: int, sparsity: Fraction, step: int) -> int:
    """The positive multiple of `step` nearest to `width * sqrt(1 / (1 - sparsity))`, ties up.

    In integers: with y = 2 k width / step, the multiplier is (floor(y) + 1) // 2.
    """
    square = Fraction(2 * width, step) ** 2 / (1 - sparsity)
    return step * max(1, (math.isqrt(math.floor(square)) + 1) // 2)
