"""The product of the Hessian and the gradient, exactly, by differentiating twice."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def hessian_gradient(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    batches: Callable[[], Iterable[dict[str, Any]]],
) -> list[Tensor]:
    """H g over `weights`, one tensor of its shape each, the same on every rank. A collective.

    g is the gradient of the mean loss by `weights`, H its second derivatives by them alone, both
    over all that `batches()` yields on all ranks; it is called twice, for g and for H g. Every
    rank must hold the weights whole.
    """

    def mean(values: list[Tensor], count: int) -> list[Tensor]:
        if dist.get_world_size() > 1:
            for value in values:
                dist.all_reduce(value)
        return [value / (count * dist.get_world_size()) for value in values]

    gradient = [torch.zeros_like(weight) for weight in weights]
    product = [torch.zeros_like(weight) for weight in weights]
    # Of the attention kernels only the plain one can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        count = 0
        for batch in batches():
            for total, part in zip(gradient, torch.autograd.grad(model(**batch), weights)):
                total += part
            count += 1
        gradient = mean(gradient, count)
        for batch in batches():
            flow = torch.autograd.grad(model(**batch), weights, create_graph=True)
            along = torch.stack([(g * part).sum() for g, part in zip(gradient, flow)]).sum()
            for total, part in zip(product, torch.autograd.grad(along, weights)):
                total += part
    return mean(product, count)
