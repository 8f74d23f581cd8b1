"""Masked dense: the dense product with a masked weight.

Costs a dense layer's time whatever the sparsity. It is right for every structure and device,
and it is what the compact kernels are measured against.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_gpt.ops.pattern import Pattern


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        dense_grad: bool,
    ) -> Tensor:
        # The masked copy is made again in backward: saving it would keep one more weight a layer.
        ctx.save_for_backward(x, weight)
        ctx.pattern, ctx.dense_grad, ctx.has_bias = pattern, dense_grad, bias is not None
        return F.linear(x, pattern.apply(weight), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dy,) = grads
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx = dw = db = None
        if need_x:
            dx = dy @ ctx.pattern.apply(weight)
        dy_rows = dy.reshape(-1, dy.shape[-1])
        if need_w:
            dw = dy_rows.t() @ x.reshape(-1, x.shape[-1])
            if not ctx.dense_grad:
                ctx.pattern.apply_(dw)
        if need_b and ctx.has_bias:
            db = dy_rows.sum(0)
        return dx, dw, db, None, None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, grad: str = "active"
) -> Tensor:
    """See `ops.reference.sparse_linear`, the specification."""
    out: Any = _MaskedLinear.apply(x, weight, bias, pattern, grad == "dense")
    return out
