"""The specification of a sparse linear layer, in plain torch and autograd.

    y = x (A * W)^T + b            A: the forward set, a 0/1 mask over W
    dX = dY (A * W)
    dW = A * (dY^T X)              grad="active": what training needs
    dW = dY^T X                    grad="dense":  what growth by gradient needs (RigL)

Every kernel is tested against this function; it is written to be read, not to be fast.
"""

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
    mask = pattern.expand()
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    masked = torch.where(mask, weight, zero)
    if grad == "dense":
        # The value of the masked weight, the gradient of the dense one.
        masked = torch.where(mask, weight, weight - weight.detach())
    return F.linear(x, masked, bias)
