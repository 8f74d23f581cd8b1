"""Powerpropagation (Schwarz et al. 2021): w = theta |theta|^(alpha - 1)."""

from typing import Any

import torch
from torch import Tensor


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, alpha: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(theta)
        ctx.alpha = alpha
        return theta * theta.abs().pow(alpha - 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Autograd's own is NaN at theta = 0 for alpha < 2: an infinite slope times sign(0).
        (theta,) = ctx.saved_tensors
        return grads[0] * (ctx.alpha * theta.abs().pow(ctx.alpha - 1)), None


def power(theta: Tensor, alpha: float) -> Tensor:
    """The weight of parameters theta (any shape); the gradient is 0 where theta is."""
    if alpha == 1.0:
        return theta
    made: Any = _Power.apply(theta, alpha)
    return made


def inverse_power(weight: Tensor, alpha: float) -> Tensor:
    """theta whose power is a weight."""
    return weight.sign() * weight.abs().pow(1 / alpha)
