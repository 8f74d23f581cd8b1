"""The specification of a sparse linear layer, in plain torch and autograd.

    y = x (A * W)^T + b            A: the forward set, a 0/1 mask over W
    dX = dY (A * W)
    dW = A * (dY^T X)              grad="active": what training needs
    dW = dY^T X                    grad="dense":  what growth by gradient needs (RigL)

Every kernel is tested against this function; it is written to be read, not to be fast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_gpt.ops.pattern import Pattern


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, grad: str = "active"
) -> Tensor:
    """`x [..., in]`, `weight [out, in]`, `bias [out]` -> `[..., out]`.

    `weight` may hold anything outside the pattern: it is not assumed to be zero there.
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    masked: Tensor = torch.where(pattern.expand(), weight, zero)
    if grad == "dense":
        masked = _StraightThrough.apply(weight, masked)  # type: ignore[assignment]
    return F.linear(x, masked, bias)


class _StraightThrough(torch.autograd.Function):
    """The value of the masked weight, the gradient of the dense one.

    Not `masked + weight - weight.detach()`: that is NaN where the weight is infinite or NaN.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor) -> Tensor:
        return masked.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None
