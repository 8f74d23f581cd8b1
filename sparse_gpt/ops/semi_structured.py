"""The kernel `semi_structured`: 2:4 sparsity on NVIDIA's sparse tensor cores, over masked storage.

    y = x W^T + b      on sparse tensor cores: two of each four weights along the input are kept
    dX = dY W          there too where W^T is 2:4 (structure.transposable: true), else dense
    dW = A * (dY^T X)  dense: nothing about dY and X is sparse

The weight is packed by torch (cuSPARSELt or CUTLASS) in every pass, as weights change every step.
At best the three products take 1/2 + 1/2 + 1 of a dense layer's 3, plus the packing.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from sparse_gpt.errors import UserError
from sparse_gpt.ops.pattern import Pattern

ROWS, COLUMNS = 32, 64  # what must divide both sides of a weight; CUTLASS's, cuSPARSELt asks less
_directions: Any = WeakIdKeyDictionary()  # a pattern's tensor -> _two_of_four of it


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why 2:4 products do not run on a device (in a dtype, if known); None where they do."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the device is {device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, and this is AMD's build of torch"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"{dtype}: it computes in bf16 and fp16; set precision"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is less than 8.0"
    if capability >= (9, 0) and not torch.backends.cusparselt.is_available():
        return (
            "this torch has no cuSPARSELt, and without it 2:4 products run on compute capability "
            f"8.x only; this is {capability[0]}.{capability[1]}"
        )
    return None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, grad: str = "active"
) -> Tensor:
    """See `ops.reference.sparse_linear`, the specification.

    Raises `UserError` where the pattern is not 2:4 along the input, or the device, dtype or
    shape cannot be.
    """
    forward, backward = _two_of_four(pattern)
    if not forward:
        raise UserError(
            "sparsity.kernel: semi_structured needs structure: {type: n_m, n: 2, m: 4}; this "
            "topology has more than two of some four weights"
        )
    reason = why_not(weight.device, weight.dtype)
    sides = [ROWS, COLUMNS] if not backward else [COLUMNS, COLUMNS]
    if reason is None and any(size % side for size, side in zip(weight.shape, sides, strict=True)):
        reason = f"a weight of {tuple(weight.shape)}: {sides} must divide its sides"
    if reason is not None:
        raise UserError(f"sparsity.kernel: semi_structured cannot run here: {reason}")
    out: Any = _SemiStructured.apply(x, weight, bias, pattern, grad == "dense", backward)
    return out


class _SemiStructured(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        dense_grad: bool,
        backward: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern, ctx.dense_grad, ctx.both_ways = pattern, dense_grad, backward
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = F.linear(rows, _pack(pattern.apply(weight)), bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dw = db = None
        if need_x:
            masked = ctx.pattern.apply(weight)
            if ctx.both_ways:
                dx = F.linear(dy.contiguous(), _pack(masked.t().contiguous()))
            else:
                dx = dy @ masked
            dx = dx.reshape(x.shape)
        if need_w:
            dw = dy.t() @ x.reshape(-1, x.shape[-1])
            if not ctx.dense_grad:
                ctx.pattern.apply_(dw)
        if need_b and ctx.bias_dtype is not None:
            db = dy.sum(0)
        return dx, dw, db, None, None, None


def _pack(weight: Tensor) -> Tensor:
    """A 2:4 `[out, in]` weight as torch's semi-structured tensor of the backend there is."""
    from torch.sparse import (
        SparseSemiStructuredTensorCUSPARSELT,
        SparseSemiStructuredTensorCUTLASS,
    )

    library = torch.backends.cusparselt.is_available()
    kind = SparseSemiStructuredTensorCUSPARSELT if library else SparseSemiStructuredTensorCUTLASS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
        return kind.from_dense(weight)


def _two_of_four(pattern: Pattern) -> tuple[bool, bool]:
    """Whether at most two of each four weights take part along the input, and along the output.

    Looked at once for a pattern: new topologies come as new tensors.
    """
    known = _directions.get(pattern.active)
    if known is None:
        mask = pattern.expand()
        known = (_at_most_two(mask), _at_most_two(mask.t()))
        _directions[pattern.active] = known
    return known


def _at_most_two(mask: Tensor) -> bool:
    if mask.shape[1] % 4:
        return False
    return bool((mask.reshape(-1, 4).sum(1) <= 2).all())
