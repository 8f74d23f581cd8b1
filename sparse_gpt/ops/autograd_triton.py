"""Sparse linear layers over compact storage by Triton kernels, as one autograd function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_gpt.ops import launch_triton as launch
from sparse_gpt.ops.compact import (
    ACTIVATIONS,
    Growth,
    Operand,
    check_operands,
    check_values,
    give_growth,
)
from sparse_gpt.ops.launch_triton import Weight
from sparse_gpt.ops.layout import BlockLayout
from sparse_gpt.ops.triton_configs import Choose, Plan, Problem, Tile


class _Setting(NamedTuple):
    """What a backward pass needs to know of its forward pass besides tensors."""

    layouts: list[BlockLayout]
    versions: list[int]
    growths: list[Growth | None]
    plans: list[Plan]
    activation: str | None
    precision: str
    differentiable: bool


class _Linears(torch.autograd.Function):
    """(x [tokens, in], setting, values and biases of all operands) -> y [tokens, out] of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, setting: _Setting, *tensors: Tensor | None) -> Any:  # type: ignore[override]
        count = len(setting.layouts)
        values, biases = tensors[:count], tensors[count:]
        keep = setting.activation is not None and setting.differentiable
        results, befores = [], []
        for layout, plan, block_values, bias in zip(
            setting.layouts, setting.plans, values, biases, strict=True
        ):
            assert block_values is not None
            y, before = _forward(x, block_values, bias, layout, plan, setting, keep)
            results.append(y)
            befores.append(before)
        ctx.setting = setting
        ctx.save_for_backward(x, *values, *befores)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        setting: _Setting = ctx.setting
        count = len(setting.layouts)
        x, *saved = ctx.saved_tensors
        values, befores = saved[:count], saved[count:]
        need_values = ctx.needs_input_grad[2 : 2 + count]
        need_biases = ctx.needs_input_grad[2 + count :]
        value_grads: list[Tensor | None] = [None] * count
        bias_grads: list[Tensor | None] = [None] * count
        terms: list[tuple[Weight, Plan]] = []
        for i, (layout, plan) in enumerate(zip(setting.layouts, setting.plans, strict=True)):
            layout.check(setting.versions[i])
            check_values(values[i], layout)
            dy = grads[i]
            if dy is None:
                continue
            dy, bias_grads[i] = _before_activation(dy, befores[i], setting, need_biases[i])
            if need_values[i]:
                value_grads[i] = _weight_gradient(
                    dy, x, layout, plan, setting.precision, setting.growths[i]
                )
            terms.append((Weight(dy, values[i], layout), plan))
        dx = _input_gradient(x, terms, setting.precision) if ctx.needs_input_grad[0] else None
        return dx, None, *value_grads, *bias_grads


def _sparse_linears(
    x: Tensor, operands: Sequence[Operand], activation: str | None, choose: Choose
) -> tuple[Tensor, ...]:
    """A `CompactKernel` whose plans `choose` makes."""
    check_operands(x, operands, activation)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    # The interpreter has no device: it takes what a Hopper GPU would.
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    layouts = [operand.layout for operand in operands]
    plans = [
        choose(
            Problem(
                shape=layout.shape, block=layout.block, slots=layout.count,
                tokens=rows.shape[0], dtype=x.dtype, precision=precision, capability=capability,
            )
        )
        for layout in layouts
    ]  # fmt: skip
    setting = _Setting(
        layouts,
        [layout.version for layout in layouts],
        [operand.growth for operand in operands],
        plans,
        activation,
        precision,
        torch.is_grad_enabled(),
    )
    made: Any = _Linears.apply(
        rows,
        setting,
        *(operand.values.contiguous() for operand in operands),
        *(operand.bias for operand in operands),
    )
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in made)


# Layouts and growth are objects that change in place: a compiled graph breaks around them, rather
# than be compiled anew for every topology.
sparse_linears: Any = torch.compiler.disable(_sparse_linears)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    layout: BlockLayout,
    plan: Plan,
    setting: _Setting,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, z), z only if there is an activation and it is to be kept."""
    activation = setting.activation
    if plan.forward is None:
        z = F.linear(x, _dense(values, layout), bias)
        return (z, None) if activation is None else (ACTIVATIONS[activation](z), z)
    y = x.new_empty(x.shape[0], layout.shape[0])
    before = torch.empty_like(y) if keep else None
    launch.dsd(
        [Weight(x, values, layout)], y, plan.forward, setting.precision,
        bias=bias, activation=activation, before=before,
    ).launch()  # fmt: skip
    return y, before


def _before_activation(
    dy: Tensor, before: Tensor | None, setting: _Setting, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what the activation was applied to, and its sums over the tokens."""
    dy = dy.contiguous()
    if before is None:
        return dy, dy.sum(0) if need_bias else None
    assert setting.activation is not None
    dz = torch.empty_like(dy)
    tiles = -(-dy.shape[0] // launch.ACTIVATION_TOKENS)
    sums = dy.new_empty(tiles, dy.shape[1], dtype=torch.float32) if need_bias else None
    launch.activation_backward(dy, before, setting.activation, dz, sums).launch()
    return dz, None if sums is None else sums.sum(0).to(dy.dtype)


def _weight_gradient(
    dy: Tensor,
    x: Tensor,
    layout: BlockLayout,
    plan: Plan,
    precision: str,
    growth: Growth | None,
) -> Tensor:
    """The gradient of the values; `growth` gets its share on the way."""
    if growth is not None and growth.kind == "norms" and plan.score is not None:
        norms = dy.new_empty(layout.grid, dtype=torch.float32)
        launch.score(dy, x, layout.block, norms, plan.score, precision).launch()
        growth.add(norms)
        growth = None
    values = x.new_empty(layout.count, *layout.block)
    if plan.weight is None or growth is not None:
        dense = dy.t() @ x
        if growth is not None:
            give_growth(growth, dense, layout.block)
        launch.move(dense, values, layout, scatter=False).launch()
        return values
    if plan.split == 1:
        launch.sdd(dy, x, layout, values[None], plan.weight, precision).launch()
        return values
    parts = x.new_empty(plan.split, *values.shape, dtype=torch.float32)
    launch.sdd(dy, x, layout, parts, plan.weight, precision).launch()
    return parts.sum(0).to(x.dtype)


def _input_gradient(x: Tensor, terms: list[tuple[Weight, Plan]], precision: str) -> Tensor | None:
    """sum of dY_i W_i."""
    dx: Tensor | None = None
    for weight, plan in terms:
        if plan.backward is None:
            dense = _dense(weight.values, weight.layout)
            dx = weight.inputs @ dense if dx is None else dx.addmm_(weight.inputs, dense)
    calls: list[tuple[Tile, list[Weight]]] = []
    for weight, plan in terms:
        if plan.backward is None:
            continue
        last = calls[-1][1] if calls else []
        if last and len(last) < launch.MOST_WEIGHTS and last[0].layout.block == weight.layout.block:
            last.append(weight)
        else:
            calls.append((plan.backward, [weight]))
    for left, (tile, weights) in zip(reversed(range(len(calls))), calls, strict=True):
        # Between calls the sum stays in fp32.
        output = torch.empty_like(x, dtype=torch.float32 if left else x.dtype)
        launch.dsd(weights, output, tile, precision, transposed=True, partial=dx).launch()
        dx = output
    return dx


def _dense(values: Tensor, layout: BlockLayout) -> Tensor:
    weight = values.new_zeros(layout.shape)
    launch.move(weight, values, layout, scatter=True).launch()
    return weight
