"""Sparse linear layers over compact storage on CPUs, in C++ (block_cpu_kernels/).

Work and memory go by the active blocks. fp32 and bf16, blocks of any size (1 x 1, too); sums are
fp32, and results do not depend on the number of threads, which is torch's.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_gpt.native import library
from sparse_gpt.ops import compact
from sparse_gpt.ops.compact import Operand, check_operands, check_values, grow_from
from sparse_gpt.ops.layout import BlockLayout

SOURCE = Path(__file__).parent / "block_cpu_kernels" / "block_cpu.cpp"
DTYPES = (torch.float32, torch.bfloat16)
_ACTIVATIONS = {None: 0, "gelu": 1, "gelu_new": 2}  # Activation of gelu.h
_APPROXIMATE = {"gelu": "none", "gelu_new": "tanh"}

# Features that a pass goes through at once. Where an input serves at most four outputs, so many
# stay in the first cache; of others, in the second, and fewer of sums over more tokens.
_NARROW_BAND, _WIDE_BAND = 128, 1024
_PANEL_BAND, _DOT_BAND, _QUAD_BAND = 512, 256, 64  # quads in the first cache, too
_PRODUCT_BAND = 2560  # of blocks that are multiplied by panels: fewer tokens, more features
_FEW_TOKENS = 256  # that all meet a weight when it comes by, if the band's inputs are near
# Of single weights all that is gone through at once stays in the first cache; at most 256.
_SINGLE_BAND, _SINGLE_DOT_BAND = 128, 80


class _Order(ctypes.Structure):
    _fields_ = (
        ("starts", c_void_p), ("columns", c_void_p), ("slots", c_void_p), ("bands", c_int32),
        ("width", c_int32),
    )  # fmt: skip


class _Operand(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p), ("bias", c_void_p), ("y", c_void_p), ("inputs", c_void_p),
        ("dy", c_void_p), ("dvalues", c_void_p), ("dbias", c_void_p), ("out", c_int64),
        ("blocks", c_int64), ("forward", _Order), ("backward", _Order), ("gradient", _Order),
    )  # fmt: skip


class _Call(ctypes.Structure):
    _fields_ = (
        ("operands", ctypes.POINTER(_Operand)), ("x", c_void_p), ("dx", c_void_p),
        ("tokens", c_int64), ("in_", c_int64), ("x_stride", c_int64), ("b_out", c_int32),
        ("b_in", c_int32), ("count", c_int32), ("half", c_int32), ("pairs", c_int32),
        ("activation", c_int32), ("threads", c_int32),
    )  # fmt: skip


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot compute layers there; None where it can."""
    if device.type != "cpu":
        return f"it computes on CPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"it has fp32 and bf16, not {str(dtype).removeprefix('torch.')}"
    if library(SOURCE) is None:
        return "there is no C++ compiler, or SPARSE_GPT_NATIVE is 0"
    if not _checked(dtype):
        return f"its {str(dtype).removeprefix('torch.')} results are wrong on this CPU"
    return None


def sparse_linears(
    x: Tensor, operands: Sequence[Operand], activation: str | None = None
) -> tuple[Tensor, ...]:
    """See `ops.compact.sparse_linears`, the specification."""
    check_operands(x, operands, activation)
    if len({operand.layout.block for operand in operands}) > 1:
        return tuple(sparse_linears(x, [operand], activation)[0] for operand in operands)
    tensors = [t for operand in operands for t in (operand.values, operand.bias)]
    keep = torch.is_grad_enabled()
    results: Any = _SparseLinears.apply(x, tuple(operands), activation, keep, *tensors)
    return results


@dataclass
class _Part:
    """What a call has of one weight; matrices `[..., out]` are contiguous."""

    layout: BlockLayout
    values: Tensor
    bias: Tensor | None = None
    y: Tensor | None = None
    inputs: Tensor | None = None  # before the activation
    dy: Tensor | None = None
    dvalues: Tensor | None = None
    dbias: Tensor | None = None


class _SparseLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        operands: tuple[Operand, ...],
        activation: str | None,
        keep: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parts = []
        for operand, values, bias in zip(operands, tensors[::2], tensors[1::2], strict=True):
            assert values is not None
            y = x.new_empty(*x.shape[:-1], operand.layout.shape[0])
            inputs = torch.empty_like(y) if keep and activation is not None else None
            bias = None if bias is None else bias.contiguous()
            parts.append(_Part(operand.layout, values, bias, y, inputs))
        _run("forward", _rows(x), parts, activation)
        if keep:
            ctx.save_for_backward(x, *tensors[::2], *(part.inputs for part in parts))
            ctx.operands, ctx.activation = operands, activation
            ctx.versions = [operand.layout.version for operand in operands]
        return tuple(part.y for part in parts if part.y is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        rows, count, parts = _rows(x), len(ctx.operands), []
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        for i, operand in enumerate(ctx.operands):
            operand.layout.check(ctx.versions[i])
            check_values(saved[i], operand.layout)
            part = _Part(operand.layout, saved[i], inputs=saved[count + i])
            part.dy = grads[i].contiguous()
            if needs[2 * i]:
                part.dvalues = torch.empty_like(part.values, memory_format=torch.contiguous_format)
            if needs[2 * i + 1]:
                part.dbias = x.new_empty(operand.layout.shape[0])
            if operand.growth is not None and needs[2 * i]:
                dy = _before_activation(part.dy, part.inputs, ctx.activation)
                grow_from(operand.growth, _rows(dy), rows, operand.layout.block)
            parts.append(part)
        dx = torch.empty_like(rows) if need_x else None
        _run("backward", rows, parts, ctx.activation, dx)
        gradients = [gradient for part in parts for gradient in (part.dvalues, part.dbias)]
        return (None if dx is None else dx.view(x.shape), None, None, None, *gradients)


def _rows(x: Tensor) -> Tensor:
    """`[..., features]` -> contiguous `[tokens, features]`."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _before_activation(dy: Tensor, inputs: Tensor | None, activation: str | None) -> Tensor:
    if activation is None or inputs is None:
        return dy
    return torch.ops.aten.gelu_backward(dy, inputs, approximate=_APPROXIMATE[activation])


def _run(
    name: str,
    x: Tensor,
    parts: Sequence[_Part],
    activation: str | None,
    dx: Tensor | None = None,
) -> None:
    """Fill what the parts and dx have room for. x `[tokens, in]`, contiguous."""
    if x.shape[0] == 0:  # sums over no tokens
        for part in parts:
            for gradient in (part.dvalues, part.dbias):
                if gradient is not None:
                    gradient.zero_()
        return
    native = library(SOURCE)
    assert native is not None, "why_not says so"
    block = parts[0].layout.block
    even = block[0] % 2 == block[1] % 2 == 0
    pairs = x.dtype == torch.bfloat16 and even and _multiplies_pairs()
    kept: list[Tensor] = []  # that only the call has pointers to
    few = x.shape[0] <= _FEW_TOKENS
    made = (_Operand * len(parts))(*(_operand(part, name, pairs, few, kept) for part in parts))
    call = _Call(
        made, _pointer(x), _pointer(dx), *x.shape, x.stride(0), *block, len(parts),
        x.dtype == torch.bfloat16, pairs, _ACTIVATIONS[activation], torch.get_num_threads(),
    )  # fmt: skip
    if getattr(native, name)(ctypes.byref(call)):
        raise MemoryError(f"block_cpu: no memory to pack {x.shape[0]} tokens into")


def _multiplies_pairs() -> bool:
    """Whether the CPU has an instruction for pairs of bf16; elsewhere they become fp32 first."""
    native = library(SOURCE)
    return native is not None and bool(native.has_bf16())


def _operand(part: _Part, name: str, pairs: bool, few: bool, kept: list[Tensor]) -> _Operand:
    layout, values = part.layout, part.values.contiguous()
    if values.data_ptr() % 4:  # pairs of bf16 are read as one
        values = values.clone()
    kept.append(values)
    pointers = (values, part.bias, part.y, part.inputs, part.dy, part.dvalues, part.dbias)
    made = _Operand(*map(_pointer, pointers), layout.shape[0], layout.count)
    rows, inputs = layout.block
    least = 32 if pairs else 16
    panels = rows % least == inputs % least == 0  # by_panel of pack.h
    quads = not panels and rows % 4 == inputs % 4 == 0  # by_quad

    def band(outputs: int) -> int:
        if panels:
            near = _PANEL_BAND if few else _PRODUCT_BAND
            return near * (2 if pairs else 1)
        if outputs % 4:
            return _NARROW_BAND
        if outputs > 4:
            return _WIDE_BAND
        # In the first cache, but as much as gives a block row work enough for its sums.
        whole, near = math.prod(layout.grid), _NARROW_BAND * (2 if pairs else 1)
        return min(_WIDE_BAND, max(1, round(whole / max(2 * layout.count, 1))) * near)

    if layout.block == (1, 1):
        if name == "forward":
            made.forward = _order(layout, False, _SINGLE_BAND)
        else:
            made.backward = _order(layout, True, _SINGLE_BAND)
            made.gradient = _order(layout, False, _SINGLE_DOT_BAND)
    elif name == "forward":
        made.forward = _order(layout, False, band(rows))
    else:
        made.backward = _order(layout, True, band(inputs))
        quad = _QUAD_BAND if pairs else _QUAD_BAND // 2
        wide = _PANEL_BAND if panels else quad if quads else _DOT_BAND
        made.gradient = _order(layout, False, wide)
    return made


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _order(layout: BlockLayout, transposed: bool, features: int) -> _Order:
    """The blocks of a weight, or of its transpose, in bands of columns of so many features."""
    key = ("block_cpu", transposed, features)
    if key not in layout.cache:
        width = layout.block[0] if transposed else layout.block[1]
        band = max(1, features // width)
        bands = -(-layout.grid[not transposed] // band)
        layout.cache[key] = (*layout.view(transposed, band), bands, band)
    kept = cast(tuple[Tensor, Tensor, Tensor, int, int], layout.cache[key])
    starts, columns, slots, bands, band = kept
    return _Order(starts.data_ptr(), columns.data_ptr(), slots.data_ptr(), bands, band)


# Blocks and an activation for each kind of product and gradient.
_CHECKED = (
    ((1, 1), "gelu"), ((4, 4), "gelu_new"), ((16, 16), "gelu"), ((32, 32), None),
    ((2, 8), "gelu_new"), ((16, 1), None), ((1, 4), None),
)  # fmt: skip


@functools.cache
def _checked(dtype: torch.dtype) -> bool:
    """Whether a small problem comes out right: not every CPU's path was run by who wrote it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    for (block, activation), tokens in itertools.product(_CHECKED, (40, 300)):
        grid = (96 // block[0], 64 // block[1])
        slots = torch.randperm(grid[0] * grid[1], generator=generator)[: grid[0] * grid[1] // 2]
        layout = BlockLayout((96, 64), block, slots)
        values, bias = random(len(slots), *block), random(96)
        x, dy = random(tokens, 64), random(tokens, 96)
        results = []
        for kernel, cast_to in ((sparse_linears, dtype), (compact.sparse_linears, torch.float64)):
            leaves = [t.to(cast_to).requires_grad_() for t in (x, values, bias)]
            with torch.enable_grad():
                (y,) = kernel(leaves[0], [Operand(leaves[1], leaves[2], layout)], activation)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(cast_to))])
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, right in zip(*results, strict=True):
            if not float((mine.double() - right).norm()) <= bound * float(right.norm()):
                return False
    return True
