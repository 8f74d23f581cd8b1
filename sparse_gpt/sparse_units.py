"""How many blocks each sparse layer of a run keeps: asked by the plan and by the topology."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from sparse_gpt.config import RunConfig
from sparse_gpt.errors import UserError
from sparse_gpt.ift import forms
from sparse_gpt.ift.iso_flop import solve_units
from sparse_gpt.model.flops import kept_units, layer_shapes, linear_shapes


def sparse_units(config: RunConfig) -> dict[str, tuple[int, int]]:
    """(kept, all) blocks of every layer `sparsity.param_filter` names; empty for a dense run.

    The nominal sparsity of every layer (uniform), to the nearest block. Where blocks made Sparse
    Wide round its widths further than the heads do, and for members that change a layer's form,
    whose sizes are whole numbers, the counts are solved again so that every layer has its base
    layer's FLOPs to the nearest block (FACTS section 8). Raises `UserError` for a filter that
    names no layer.
    """
    sparsity = config.sparsity
    if sparsity.sparsity == 0.0:
        return {}
    shapes = linear_shapes(config.dims, config.transform)
    plain = {f"{forms.layer_of(name)}.weight" for name in shapes}
    for glob in sparsity.param_filter:
        if not any(fnmatchcase(name, glob) for name in (*shapes, *plain)):
            raise UserError(
                f"sparsity.param_filter: {glob} matches no layer; layers are "
                "h.<i>.attn.{q,k,v,o}.weight and h.<i>.mlp.{fc1,fc2}.weight"
            )
    block = sparsity.structure.block
    solved: dict[str, int] = {}
    nominal = config.ift.sparsity in (None, sparsity.sparsity)
    if config.ift.member == "wide" and config.width_multiple is not None and nominal:
        solved = solve_units(config.base_dims, config.dims, block)
    if config.transform is not None and nominal:
        solved = solve_forms(config.transform, layer_shapes(config.dims), math.prod(block))
    units = {
        name: out * inner // math.prod(block)
        for name, (out, inner) in shapes.items()
        if config.names_layer(name)
    }
    return {
        name: (solved[name] if solved else kept_units(count, sparsity.sparsity), count)
        for name, count in units.items()
    }


def solve_forms(
    transform: forms.Transform, layers: Mapping[str, tuple[int, int]], block_size: int
) -> dict[str, int]:
    """Active blocks of each sparse weight of the transformed layers: the dense layer's MACs."""
    return {
        f"{layer}.{name}": count
        for layer, (out, inner) in layers.items()
        for name, count in forms.solve_units(
            forms.weights_of(transform, layer, (out, inner)), out * inner, block_size
        ).items()
    }
