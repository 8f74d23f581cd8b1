"""Iso-FLOP per sparsified layer: what rounding the widths costs, and block counts that pay it back.

Sparse Wide keeps each sparsified layer's FLOPs, not the model's: the LM head and the attention
scores grow with the width (FACTS section 3). Only the layers are balanced here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from sparse_gpt.errors import UserError
from sparse_gpt.ift.forms import Transform
from sparse_gpt.model.flops import linear_shapes, linear_weights


@dataclass(frozen=True)
class Residual:
    """MACs per token of a kind of layer (`attn.q`, ..., `mlp.fc2`), over all blocks."""

    base: int
    active: int

    @property
    def excess(self) -> Fraction:
        """FLOPs of the sparsified layers over those of the base layers, minus 1."""
        return Fraction(self.active, self.base) - 1


def solve_units(
    base: Mapping[str, int], wide: Mapping[str, int], block: tuple[int, int] = (1, 1)
) -> dict[str, int]:
    """Active blocks of each weight of the wide model, nearest to the base layer's MACs.

    Keys are weight names (`h.0.attn.q.weight`, ...), values counts of `block = (b_out, b_in)`
    blocks; a tie takes the smaller count, at least one block stays. Raises `UserError` where the
    block does not divide a layer or the base layer needs more blocks than there are.
    """
    b_out, b_in = block
    size = b_out * b_in
    dense = linear_shapes(base)
    units: dict[str, int] = {}
    for name, (out, inner) in linear_shapes(wide).items():
        if out % b_out or inner % b_in:
            raise UserError(
                f"sparsity.structure.block: {b_out} x {b_in} does not divide {name} "
                f"({out} x {inner}); choose another block or set ift.multiple_of"
            )
        if name not in dense:
            raise UserError(f"model.n_layer: {name} is not in the base model; keep n_layer")
        macs = dense[name][0] * dense[name][1]
        units[name] = max(1, -(-(2 * macs - size) // (2 * size)))
        if units[name] > (out // b_out) * (inner // b_in):
            raise UserError(
                f"ift: {name} ({out} x {inner}) is smaller than the base layer "
                f"{dense[name]}; the model as trained must be at least as wide"
            )
    return units


def residual(
    base: Mapping[str, int],
    wide: Mapping[str, int],
    active: Mapping[str, int],
    transform: Transform | None = None,
) -> dict[str, Residual]:
    """Per kind of layer and in all (`"all"`): base MACs against active MACs per token.

    `active` maps weight names of the model as trained (`wide`, `transform`) to counts of active
    weights; a weight left out is dense.
    """
    base_macs: dict[str, int] = {}
    wide_macs: dict[str, int] = {}
    for macs, weights, counts in (
        (base_macs, linear_weights(base), {}),
        (wide_macs, linear_weights(wide, transform), active),
    ):
        for name, weight in weights.items():
            kind = ".".join(name.split(".")[2:4])
            for key in (kind, "all"):
                macs[key] = macs.get(key, 0) + counts.get(name, weight.numel)
    kinds = [kind for kind in base_macs if kind != "all"]
    return {kind: Residual(base_macs[kind], wide_macs[kind]) for kind in [*kinds, "all"]}
