"""Loss over a held-out split, by the engine that trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_gpt.data.loader import IGNORED_TARGET, Batch, PackedDataset, eval_batches


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a token over a split, and how many tokens were scored."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch as keyword arguments of the model, on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def evaluate(
    engine: Any,
    dataset: PackedDataset,
    batch_size: int,
    sequences: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean loss over (the first `sequences`) whole windows of a split. A collective.

    `on_batch` is called before each batch.

    Sums run in float64, so the result depends on the number of ranks by rounding alone.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    totals = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.eval()
    with torch.no_grad():
        for batch in eval_batches(dataset, batch_size, rank, world_size, sequences):
            on_batch()
            totals[0] += engine(**to_device(batch, engine.device), reduction="sum").double()
            totals[1] += int((batch["targets"] != IGNORED_TARGET).sum())
    engine.train()
    if world_size > 1:
        dist.all_reduce(totals)
    return Evaluation(float(totals[0] / totals[1]), int(totals[1]))
