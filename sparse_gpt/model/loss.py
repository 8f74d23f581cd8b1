"""Cross-entropy of a language model's head without all its logits at once.

Logits of T tokens over a vocabulary of V are T x V numbers, and autograd keeps their fp32
copies: at V = 50,257 more than all blocks of a small model do. Here a chunk of tokens at a time
gets its logits and, as the loss is a scalar, their gradient right away: the same three products,
nothing made twice, and memory for one chunk.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # target value that is not scored


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, reduction: str
) -> Tensor:
    """`cross_entropy(hidden weight^T, targets)` in nats, fp32 (fp64 for fp64).

    `hidden [T, d]`, `weight [V, d]`, `targets [T]` (-100 = not scored), `reduction` mean or sum;
    `chunk` tokens at a time. It differs from the loss of all logits in the order of sums over
    tokens alone. The weight's gradient is summed in fp32 (fp64).
    """
    if not torch.is_grad_enabled():  # in forward, inputs seem to need gradients even then
        hidden, weight = hidden.detach(), weight.detach()
    loss: Any = _HeadLoss.apply(hidden, weight, targets, chunk, reduction == "mean")
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, mean: bool
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        scored = targets != IGNORE
        places = torch.where(scored, targets, 0)
        losses = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        count = scored.sum().to(dtype) if mean else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows, at = hidden[part], places[part, None]
            scores = torch.log_softmax((rows @ weight.t()).to(dtype), -1)
            losses[part] = -scores.gather(1, at)[:, 0]
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = scores.exp_()
            gradient.scatter_add_(1, at, gradient.new_full((), -1.0).expand(at.shape))
            gradient *= scored[part, None] if count is None else scored[part, None] / count
            narrow = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, weight, out=grad_hidden[part])
            if grad_weight is not None and grad_weight.dtype == narrow.dtype:
                grad_weight.addmm_(narrow.t(), rows)
            elif grad_weight is not None:
                grad_weight += narrow.t() @ rows
        ctx.gradients = [grad_hidden, grad_weight]
        ctx.dtypes = hidden.dtype, weight.dtype
        total = torch.where(scored, losses, 0).sum()
        return total if count is None else total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss are gone: a second backward pass")
        made, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(grads[0]).to(dtype)
            for gradient, dtype in zip(made, ctx.dtypes)
        ]
        return *scaled, None, None, None
