"""What was not finite in a step: which losses, of which samples, and which gradients."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.data.loader import PackedDataset
from sparse_gpt.topology.shards import Shards

NAMED = 4  # losses, parameters, samples of a micro-batch: that many are named


def describe_bad_step(
    shards: Shards,
    losses: Sequence[Tensor],
    dataset: PackedDataset,
    first_sample: int,
    micro_batch_size: int,
) -> str:
    """Every rank's findings in words, on every rank. A collective.

    `losses`: this rank's, 0-d, one a micro-step. `first_sample`: of the global batch. Before the
    gradients are zeroed; those outside what is trained are not looked at any more.
    """
    bad_losses = [i for i, loss in enumerate(losses) if not bool(torch.isfinite(loss))]
    bad_gradients = []
    for name in shards.parameters:
        gradient = shards.gradient(name)
        if gradient is not None and gradient.numel() and not bool(torch.isfinite(gradient).all()):
            bad_gradients.append(name)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (bad_losses, bad_gradients))
    world_size = len(found)

    def samples(rank: int, micro_step: int) -> str:
        """See `TrainLoader`: who gets which of the global batch."""
        first = first_sample + (micro_step * world_size + rank) * micro_batch_size
        places = [dataset.describe(i) for i in range(first, first + micro_batch_size)]
        more = f", and {len(places) - NAMED} more" if len(places) > NAMED else ""
        return "; ".join(places[:NAMED]) + more

    bad = [(rank, step) for rank, (steps, _) in enumerate(found) for step in steps]
    if bad:
        parts = [
            f"the loss of micro-step {step + 1} of rank {rank} ({samples(rank, step)})"
            for rank, step in bad[:NAMED]
        ]
        if len(bad) > NAMED:
            parts.append(f"{len(bad) - NAMED} more losses")
    else:
        last = first_sample + world_size * len(losses) * micro_batch_size - 1
        parts = [f"no loss of samples {first_sample} to {last}"]
    names = {name for _, gradients in found for name in gradients}
    if names:
        ordered = [name for name in shards.parameters if name in names]
        where = ", ".join(str(rank) for rank, (_, gradients) in enumerate(found) if gradients)
        parts.append(
            f"gradients of {len(ordered)} of {len(shards.parameters)} parameters "
            f"(the nearest to the loss {ordered[-1]}, the farthest {ordered[0]}; "
            f"on rank{'s' * (',' in where)} {where})"
        )
    else:
        parts.append("no gradient of what is trained")
    return "not finite: " + ", ".join(parts)
