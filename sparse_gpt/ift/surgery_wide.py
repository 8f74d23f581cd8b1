"""Sparse Wide for any network of linear layers, convolutions and norms (Sparse-IFT, App. A.1).

Widening one layer alone leaves its neighbours at other widths, so `widen` changes a network at
once: every width w inside it becomes the nearest integer to k_sw w, k_sw = sqrt(1 / (1 - s)), but
for the inputs of its first layer and the outputs of its last. One rule for all widths keeps
residual sums consistent; what it does not (a concatenation or a flattening whose parts round
differently) shows in a run on an example and is refused.

Each layer then has as many active weights as the dense layer had: the sparsity s inside,
1 - 1 / k_sw in the first and the last layer and in depthwise convolutions, whose weights grow with
one width alone. The paper's depthwise form (outputs only, by 1 / (1 - s)) is `wide_layer`'s: it
leaves the neighbours at widths that a network has to be written for.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sparse_gpt.errors import UserError
from sparse_gpt.ift.forms import LayerWeight, solve_units
from sparse_gpt.ift.masked import MaskedConv2d, MaskedLinear, conv_options, random_mask
from sparse_gpt.ift.surgery import (
    Layer,
    LayerReport,
    Report,
    check_block,
    choose,
    drawn,
    is_depthwise,
    layers_of,
    matrix_shape,
    scale_of,
    set_submodule,
    transformed,
)
from sparse_gpt.ift.wide import exact, nearest_multiple

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def widen(
    module: nn.Module,
    sparsity: float,
    *example: Any,
    first: Sequence[str] | None = None,
    last: Sequence[str] | None = None,
    keep_dense: Sequence[str] = (),
    multiple_of: int = 1,
    block: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> Report:
    """Make a network Sparse Wide, in place; masks are random and fixed, weights drawn anew.

    `example`: inputs of the network; it is run on them before and after. `first`, `last`: names of
    the layers that take the network's inputs and make its outputs; the first and last ones that run
    by default. `keep_dense`: globs of layers that are widened but not masked. Widths inside are
    multiples of `multiple_of`. Weights have the scale of the layer's own, biases and norms the mean
    of theirs. Sparsity 0 changes nothing. Call it before the optimizer is made.

    Raises `UserError`, the module as it was, for parameters of modules that it cannot widen, for
    widths that do not fit, and as `surgery.transform`.
    """
    ratio = exact(sparsity)
    if not 0 <= ratio < 1:
        raise UserError(f"sparsity {sparsity} is not in [0, 1)")
    dense = _dense_layers(module, keep_dense)

    def make(name: str, layer: Layer, inner: int, out: int) -> tuple[nn.Module, LayerReport]:
        return _wide(name, layer, inner, out, seed, None if name in dense else block)

    if ratio == 0:
        sizes = {name: layer.weight.numel() for name, layer in layers_of(module).items()}
        return Report(tuple(LayerReport(name, "wide", n, n, n) for name, n in sizes.items()))
    return _change_widths(module, ratio, example, first, last, multiple_of, make)


def widen_low_rank(
    module: nn.Module,
    k_lr: float,
    *example: Any,
    non_linearity: str = "relu",
    first: Sequence[str] | None = None,
    last: Sequence[str] | None = None,
    keep_dense: Sequence[str] = (),
    multiple_of: int = 1,
    seed: int = 0,
) -> Report:
    """Widen a network by k_lr and give its layers the form of Low Rank, dense (App. C.3.3).

    The rank is that at which a layer has the FLOPs of the one before. Layers of `keep_dense` and
    depthwise convolutions are widened alone. Everything else as `widen`.
    """
    if not k_lr >= 1:
        raise UserError(f"k_lr {k_lr} is not 1 or more")
    dense = _dense_layers(module, keep_dense)

    def make(name: str, layer: Layer, inner: int, out: int) -> tuple[nn.Module, LayerReport]:
        made, report = _wide(name, layer, inner, out, seed, None)
        if name in dense or is_depthwise(layer):
            return made, report
        return transformed(
            name, made, "low_rank", 0.0, non_linearity, (1, 1), seed, matrix_shape(layer)
        )

    ratio = 1 - 1 / exact(k_lr) ** 2
    return _change_widths(module, ratio, example, first, last, multiple_of, make)


def _dense_layers(module: nn.Module, keep_dense: Sequence[str]) -> set[str]:
    """Names of the layers that keep all weights; refuses what cannot be widened."""
    choose(module, ("*",), ())  # no weight may be used twice, dense ones included
    _check_parts(module)
    return layers_of(module).keys() - choose(module, ("*",), keep_dense)


def _change_widths(
    module: nn.Module,
    ratio: Fraction,
    example: tuple[Any, ...],
    first: Sequence[str] | None,
    last: Sequence[str] | None,
    multiple_of: int,
    make: Callable[[str, Layer, int, int], tuple[nn.Module, LayerReport]],
) -> Report:
    """Put `make(name, layer, in, out)` in the place of every layer, and norms of those widths."""
    order, shapes = _run(module, example)
    if not order:
        raise UserError("the network ran no linear layer or convolution on the example")
    ends = {"first": first or order[:1], "last": last or order[-1:]}
    for key, names in ends.items():
        for name in names:
            if name not in layers_of(module):
                raise UserError(f"{key}: {name!r} is no linear layer or convolution")

    def wide(width: int) -> int:
        return nearest_multiple(width, ratio, multiple_of)

    reports, before, replacements = [], {}, {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            rows, columns = _features(part)
            inner = columns if name in ends["first"] else wide(columns)
            made, report = make(name, part, inner, rows if name in ends["last"] else wide(rows))
            reports.append(report)
        elif isinstance(part, Norm):
            made = _wide_norm(name, part, wide)
        else:
            continue
        before[name], replacements[name] = part, made
    for name, made in replacements.items():
        set_submodule(module, name, made)
    try:
        _, wide_shapes = _run(module, example)
        problem = f"its outputs are {wide_shapes}, not {shapes}" if wide_shapes != shapes else ""
    except (RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())
    if problem:
        for name, part in before.items():
            set_submodule(module, name, part)
        raise UserError(
            f"the widened network does not fit together ({problem}); name the layers that take its "
            "inputs (first) and make its outputs (last), or choose multiple_of or a sparsity at "
            "which widths that are joined round alike"
        )
    return Report(tuple(reports))


def wide_layer(
    name: str, layer: Layer, sparsity: float, *, block: tuple[int, int] = (1, 1), seed: int = 0
) -> tuple[nn.Module, LayerReport]:
    """One layer made Sparse Wide: inputs and outputs by sqrt(1 / (1 - s)).

    Of a depthwise convolution the outputs alone, by 1 / (1 - s) to the nearest integer: the inputs
    stay, as more of them would make it a grouped one (App. A.1.1).
    """
    ratio = exact(sparsity)
    if not 0 <= ratio < 1:
        raise UserError(f"sparsity {sparsity} is not in [0, 1)")
    rows, columns = _features(layer)
    if is_depthwise(layer):
        rows *= max(1, math.floor(1 / (1 - ratio) + Fraction(1, 2)))
        return _wide(name, layer, columns, rows, seed, block)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise UserError(f"{name}: {layer.groups} groups cannot be widened; keep the layer as it is")
    inner, out = (nearest_multiple(width, ratio, 1) for width in (columns, rows))
    return _wide(name, layer, inner, out, seed, block)


def _features(layer: Layer) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _check_parts(module: nn.Module) -> None:
    """Refuse a module that has parameters or buffers whose widths have no rule."""
    for name, part in module.named_modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        if not own:
            continue
        if isinstance(part, nn.Conv2d) and part.groups > 1 and not is_depthwise(part):
            raise UserError(f"{name}: a convolution of {part.groups} groups cannot be widened")
        if isinstance(part, nn.LayerNorm) and len(part.normalized_shape) != 1:
            raise UserError(f"{name}: a LayerNorm over {part.normalized_shape} cannot be widened")
        if type(part) not in (nn.Linear, nn.Conv2d, *NORMS):
            raise UserError(
                f"{name or 'the module'}: {own[0][0]} of a {type(part).__name__} has no rule for "
                "widening (linear layers, Conv2d, BatchNorm, LayerNorm and GroupNorm have)"
            )


def _run(module: nn.Module, example: tuple[Any, ...]) -> tuple[list[str], list[tuple[int, ...]]]:
    """Layers in the order in which they run, and the shapes of the outputs."""
    order: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, layer in layers_of(module).items()
    ]
    training = {part: part.training for part in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            outputs = module(*example)
    finally:
        for part, mode in training.items():
            part.training = mode
        for hook in hooks:
            hook.remove()
    several = outputs if isinstance(outputs, tuple | list) else [outputs]
    return order, [tuple(output.shape) for output in several if isinstance(output, Tensor)]


def _wide(
    name: str,
    layer: Layer,
    inner: int,
    out: int,
    seed: int,
    block: tuple[int, int] | None,
) -> tuple[MaskedLinear | MaskedConv2d, LayerReport]:
    """The layer at other widths with its own number of active weights; dense without `block`."""
    own, options = layer.weight.detach(), {}
    shape: tuple[int, ...] = (out, inner)
    if isinstance(layer, nn.Conv2d):
        options = conv_options(layer)
        if is_depthwise(layer):
            options["groups"] = inner
            if out % inner:
                raise UserError(
                    f"{name}: {out} outputs are no multiple of {inner} inputs in a depthwise "
                    "convolution; choose multiple_of or another sparsity"
                )
        shape = (out, inner // options["groups"], *layer.kernel_size)
    key = f"{name}.weight"
    values = drawn(seed, key, shape, scale_of(layer), own)
    entry = LayerWeight((out, values[0].numel()))
    macs, mask = math.prod(matrix_shape(layer)), None
    active = entry.numel
    if block is not None and entry.numel > macs:
        check_block(key, entry.shape, block)
        units = solve_units({key: entry}, macs, math.prod(block))[key]
        mask = random_mask(seed, key, shape, units, block).to(own.device)
        values *= mask
        active = units * math.prod(block)
    bias = None
    if layer.bias is not None:
        bias = nn.Parameter(layer.bias.detach().mean().expand(out).clone())
    made = (
        MaskedLinear(values, mask, bias)
        if isinstance(layer, nn.Linear)
        else MaskedConv2d(values, mask, bias, **options)
    )
    made.train(layer.training)
    return made, LayerReport(name, "wide", macs, active, entry.numel)


def _wide_norm(name: str, norm: Norm, wide: Callable[[int], int]) -> nn.Module:
    """The norm at another width: parameters and statistics are the means of its own."""
    made: nn.Module
    if isinstance(norm, nn.LayerNorm):
        made = nn.LayerNorm(
            wide(norm.normalized_shape[0]), norm.eps, norm.elementwise_affine, norm.bias is not None
        )
    elif isinstance(norm, nn.GroupNorm):
        width = wide(norm.num_channels)
        if width % norm.num_groups:
            raise UserError(
                f"{name}: {norm.num_groups} groups do not divide the width {width}; "
                f"set multiple_of: {norm.num_groups}"
            )
        made = nn.GroupNorm(norm.num_groups, width, norm.eps, norm.affine)
    else:
        made = type(norm)(
            wide(norm.num_features), norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
    own = norm.state_dict()
    for value in own.values():
        made.to(value.device, value.dtype if value.is_floating_point() else None)
    made.load_state_dict(
        {
            key: own[key].float().mean().expand(new.shape) if new.dim() else own[key]
            for key, new in made.state_dict().items()
        }
    )
    return made.train(norm.training)
