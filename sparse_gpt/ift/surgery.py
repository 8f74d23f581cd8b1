"""Sparse-IFT for any module of `nn.Linear` and `nn.Conv2d` (Sparse-IFT, App. A.1).

A convolution is taken as the matrix `[c_out, c_in * k_h * k_w]`: U is a convolution to the inner
width with its kernel, stride and padding, V one of 1 x 1. `transform` changes layers in place, one
by one: inputs and outputs keep their widths. Sparse Wide changes the widths of a whole network:
see `ift.surgery_wide`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparse_gpt.errors import UserError
from sparse_gpt.ift.forms import (
    FORMS,
    TRUNCATED_VARIANCE,
    LayerWeight,
    layer_weights,
    solve_size,
    solve_units,
    weight_std,
)
from sparse_gpt.ift.layers import SIGMAS, NonLinearity, transformed_layer
from sparse_gpt.ift.masked import MaskedConv2d, MaskedLinear, conv_options, random_mask
from sparse_gpt.model.gpt import draw_weight

Layer = nn.Linear | nn.Conv2d


def _batchnorm_relu(features: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(features), nn.ReLU())


CONV_SIGMAS: dict[str, NonLinearity] = {**SIGMAS, "batchnorm_relu": _batchnorm_relu}


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer. MACs are those of one output position (a row of a linear layer)."""

    name: str
    member: str  # "dense": left as it was, for the `reason`
    base_macs: int
    macs: int
    weights: int
    size: int | None = None  # branches, or the inner width
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Every linear layer and convolution of a module, in its order."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [
            f"{r.name}: {r.member}{'' if r.size is None else f' {r.size}'}, {r.macs:,} MACs "
            f"({r.base_macs:,} before), {r.weights:,} weights{r.reason and f'; {r.reason}'}"
            for r in self.layers
        ]
        return "\n".join(lines)


def transform(
    module: nn.Module,
    member: str,
    sparsity: float,
    *,
    filter: Sequence[str] = ("*",),
    keep_dense: Sequence[str] = (),
    non_linearity: str = "relu",
    block: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Report:
    """Give the layers of a module a member's form, in place; masks are random and fixed.

    `filter` and `keep_dense`: globs of layer names. `non_linearity`: identity, relu, gelu, or for
    convolutions batchnorm_relu (the paper's in ResNets, App. C.2). A mask is a buffer with
    an exact count of active `block`s, from (seed, weight name); a layer has the FLOPs of the dense
    one to the nearest block. New weights are drawn at the scale of the layer's own
    (`forms.weight_std`), the first branch of Parallel and the sparse weight of Doped are the
    layer's own. Depthwise convolutions stay as they are (App. A.1.1); so do grouped ones but for
    Parallel, and the report says why. Call it before the optimizer is made.

    Raises `UserError` for what cannot be done: an unknown member or non-linearity, a sparsity
    outside [0, 1) or for Low Rank not 0, globs without a match, a layer used under two names,
    and a weight shared by two layers.
    """
    if member not in FORMS:
        hint = "; widen changes a network's widths" if member == "wide" else ""
        raise UserError(f"member {member!r} is none of {', '.join(FORMS)}{hint}")
    if not 0 <= sparsity < 1 or (member == "low_rank" and sparsity):
        raise UserError(
            f"sparsity {sparsity}: low_rank has dense weights, sparsity 0"
            if member == "low_rank"
            else f"sparsity {sparsity} is not in [0, 1)"
        )
    chosen = choose(module, filter, keep_dense)
    reports, replacements = [], {}
    for name, layer in layers_of(module).items():
        reason = why_dense(name, layer, member) if name in chosen else "not chosen"
        if reason:
            macs = layer.weight.numel()
            reports.append(LayerReport(name, "dense", macs, macs, macs, reason=reason))
            continue
        made, report = transformed(name, layer, member, sparsity, non_linearity, block, seed)
        replacements[name] = made
        reports.append(report)
    for name, made in replacements.items():
        set_submodule(module, name, made)
    return Report(tuple(reports))


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """Every linear layer and convolution by name, subclasses included."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def choose(module: nn.Module, filter: Sequence[str], keep_dense: Sequence[str]) -> set[str]:
    """Names of the layers that are to change; `UserError` for those that cannot."""
    layers = layers_of(module)
    for key, globs in (("filter", filter), ("keep_dense", keep_dense)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in layers):
                raise UserError(f"{key}: {glob!r} matches no linear layer or convolution")

    def any_of(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    chosen = {n for n in layers if any_of(n, filter) and not any_of(n, keep_dense)}
    if "" in chosen:
        raise UserError("the module is a layer itself; put it into an nn.Sequential")
    names: dict[int, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for key, parameter in part.named_parameters(recurse=False):
            other = names.setdefault(id(parameter), f"{name}.{key}")
            if other != f"{name}.{key}" and {name, other.rpartition(".")[0]} & chosen:
                raise UserError(
                    f"{name}.{key} is {other} too: a weight that is used twice cannot have a form "
                    f"in one place; add {name} and {other.rpartition('.')[0]} to keep_dense"
                )
    return chosen


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each input channel has filters of its own."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def why_dense(name: str, layer: Layer, member: str) -> str:
    """Why a layer that was chosen stays as it is; empty where it does not."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__}, whose owner may use its weight directly"
    if is_depthwise(layer):
        return "depthwise (App. A.1.1)"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and member != "parallel":
        return f"{layer.groups} groups, whose factors would mix them"
    return ""


def set_submodule(module: nn.Module, name: str, made: nn.Module) -> None:
    """Put a module in the place of another of that name."""
    parent, _, key = name.rpartition(".")
    setattr(module.get_submodule(parent), key, made)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """`[out, in]` of the layer's weight as a matrix."""
    return layer.weight.shape[0], layer.weight[0].numel()


def check_block(name: str, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Refuse blocks that do not divide a weight."""
    if shape[0] % block[0] or shape[1] % block[1]:
        raise UserError(f"block {block} does not divide {name} of {shape}; add it to keep_dense")


def scale_of(layer: Layer) -> float:
    """The std at which truncated normal values have the standard deviation of a layer's weights."""
    weight = layer.weight.detach().float()
    return float(weight.std()) / TRUNCATED_VARIANCE**0.5 if weight.numel() > 1 else 0.0


def drawn(seed: int, name: str, shape: tuple[int, ...], std: float, like: Tensor) -> Tensor:
    """A weight from (seed, name), of the dtype and on the device of another."""
    values = draw_weight(seed, name, shape, std) if std else torch.zeros(shape)
    return values.to(like)


def transformed(
    name: str,
    layer: Layer,
    member: str,
    sparsity: float,
    non_linearity: str,
    block: tuple[int, int],
    seed: int,
    base_shape: tuple[int, int] | None = None,
) -> tuple[nn.Module, LayerReport]:
    """A layer in a member's form; `base_shape` as for `forms.solve_size`."""
    sigmas = CONV_SIGMAS if isinstance(layer, nn.Conv2d) else SIGMAS
    if non_linearity not in sigmas:
        raise UserError(f"non_linearity {non_linearity!r}: {name} takes one of {', '.join(sigmas)}")
    sigma = sigmas[non_linearity]
    shape, block_size = matrix_shape(layer), math.prod(block)
    size = solve_size(member, sparsity, shape, base_shape, math.lcm(*block))
    weights = layer_weights(member, size, shape)
    units: dict[str, int] = {}
    if sparsity:
        for weight, entry in weights.items():
            if entry.sparse:
                check_block(f"{name}.{weight}", entry.shape, block)
        units = solve_units(weights, math.prod(shape), block_size)
    own, std = layer.weight.detach(), scale_of(layer)

    def make(part: str, entry: LayerWeight) -> nn.Module:
        key = f"{part}.weight"
        target: tuple[int, ...] = entry.shape
        if isinstance(layer, nn.Conv2d):
            target = (*entry.shape, 1, 1) if part == "v" else (entry.shape[0], *own.shape[1:])
        if part in ("branch.0", "sparse"):
            values = own.clone()
        else:
            scale = weight_std(member, size, shape, key, std)
            values = drawn(seed, f"{name}.{key}", target, scale, own)
        mask = None
        if key in units:
            mask = random_mask(seed, f"{name}.{key}", target, units[key], block).to(own.device)
            values *= mask
        if isinstance(layer, nn.Linear):
            return MaskedLinear(values, mask, None)
        return MaskedConv2d(values, mask, None, **({} if part == "v" else conv_options(layer)))

    spatial = 2 if isinstance(layer, nn.Conv2d) else 0
    assert layer.bias is None or isinstance(layer.bias, nn.Parameter)
    made = transformed_layer(member, size, shape, sigma, make, layer.bias, spatial)
    made.train(layer.training).to(own.device)
    active = sum(units[n] * block_size if n in units else w.numel for n, w in weights.items())
    numel = sum(weight.numel for weight in weights.values())
    return made, LayerReport(name, member, math.prod(base_shape or shape), active, numel, size)
