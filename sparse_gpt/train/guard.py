"""Norm, clipping, the check for non-finite numbers, requests to stop: one exchange a step.

DeepSpeed's own clipping is off: it would count the dense gradients of a growing step (at CPU
offload they enter its norm during backward), and at stage 0 it would apply a non-finite step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.topology.shards import Shards


class Diverged(UserError):
    """Too many steps in a row were not finite."""


@dataclass(frozen=True)
class StepHealth:
    """Global gradient norm (over the trained set only) and mean loss; whether both are finite.

    `stops`: how many ranks ask to stop, for each of `signals.REASONS`.
    """

    grad_norm: float
    loss: float
    finite: bool
    stops: tuple[float, ...] = ()


def inspect_step(
    shards: Shards,
    loss: Tensor,
    finite: Tensor,
    square_sum: Callable[[str, Tensor], Tensor],
    stops: Sequence[float] = (),
) -> StepHealth:
    """Combine every rank's gradient fragments, loss (0-d), finite flag (0-d bool), stop flags.

    `square_sum(name, gradient)`: 0-d, of what is trained in a rank's part of a gradient.
    """
    device = shards.engine.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if not shards.replicated or dist.get_rank() == 0:
        for name in shards.parameters:
            gradient = shards.gradient(name)
            if gradient is not None and gradient.numel():
                total += square_sum(name, gradient).to(device)
    bad = (~finite.to(device)).double()
    values = torch.stack([total, bad, loss.detach().double().to(device)])
    values = torch.cat([values, torch.tensor(stops, dtype=torch.float64, device=device)])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    squares, bad_ranks, loss_sum, *asked = values.tolist()
    mean_loss = loss_sum / dist.get_world_size()
    is_finite = bad_ranks == 0 and _finite(squares) and _finite(mean_loss)
    norm = squares**0.5 if squares >= 0 else squares
    return StepHealth(norm, mean_loss, is_finite, tuple(asked))


def clip_gradients(shards: Shards, norm: float, max_norm: float) -> None:
    """Scale every gradient fragment in place so that the global norm is at most `max_norm`."""
    if max_norm <= 0 or norm <= max_norm:
        return
    scale = max_norm / (norm + 1e-6)
    for name in shards.parameters:
        gradient = shards.gradient(name)
        if gradient is not None:
            gradient.mul_(scale)


def _finite(value: float) -> bool:
    return value - value == 0
