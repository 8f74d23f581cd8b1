"""The usual topology update, as the baseline: gather a layer, select on rank 0, broadcast the mask.

One layer at a time, the kindest to memory it can be; the gradient that grows weights is kept from
before the optimizer's step. Same masks as ours (ties by index), unstructured only.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.random import random_scores


def keep_gradients(controller: TopologyController) -> dict[str, Tensor]:
    """Copies of this rank's dense gradients, before the optimizer consumes them."""
    kept = {}
    for name in controller.layers:
        gradient = controller.shards.gradient(name)
        if gradient is not None:
            kept[name] = gradient.float().clone()
    return kept


def update(
    controller: TopologyController,
    gradients: dict[str, Tensor],
    fraction: float,
    index: int,
    apply: bool = True,
) -> dict[str, Tensor]:
    """One update; returns every layer's mask, bool `[units]`, on every rank. A collective.

    `apply`: zero weights and moments outside.
    """
    shards, masks = controller.shards, {}
    for name, mask in controller.masks.items():
        fragment = shards.fragment(name)
        part = None if fragment is None else fragment.master
        weight = _gather(shards, fragment, part, mask.units)
        flags = None if part is None else mask.bits.flags()
        active = _gather(shards, fragment, flags, mask.units, torch.uint8)
        gradient = None
        if controller.method.growth == "gradient":
            gradient = _gather(shards, fragment, gradients.get(name), mask.units)
        new = torch.empty(mask.units, dtype=torch.bool, device=shards.device)
        if dist.get_rank() == 0:
            assert weight is not None and active is not None
            growth = gradient.abs() if gradient is not None else None
            if growth is None:
                growth = random_scores(controller.seed, index, name, 0, mask.units, shards.device)
            new = select(weight.abs(), active.bool(), growth, int(fraction * mask.active))
        if dist.get_world_size() > 1:
            dist.broadcast(new, 0)
        masks[name] = new
        if apply and fragment is not None:
            inside = new[fragment.start : fragment.start + fragment.numel]
            for tensor in fragment.tensors().values():
                tensor.masked_fill_(~inside.to(tensor.device), 0)
    return masks


def select(magnitude: Tensor, active: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drop and grow, all 1-D of one length; bool of the new mask."""
    kept = active.nonzero().view(-1)
    result = active.clone()
    result[kept[smallest(magnitude[kept], count)]] = False
    free = (~result).nonzero().view(-1)
    result[free[smallest(-growth[free], count)]] = True
    return result


def smallest(scores: Tensor, count: int) -> Tensor:
    """bool: the `count` smallest, ties by index; from the k-th value, faster than by sorting."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(count).values
    chosen = scores < cut
    ties = (scores == cut).nonzero().view(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _gather(
    shards: Any,
    fragment: Any,
    part: Tensor | None,
    total: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Rank 0 gets the whole of a layer from every rank's part; the others None."""
    if shards.replicated or dist.get_world_size() == 1:
        return part
    start = torch.tensor([0 if fragment is None else fragment.start], device=shards.device)
    count = torch.tensor([0 if part is None else part.numel()], device=shards.device)
    ranges = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64, device=shards.device)
    ranges[dist.get_rank()] = torch.cat([start, count])
    dist.all_reduce(ranges)
    if dist.get_rank() > 0:
        if part is not None and part.numel():
            dist.send(part.contiguous().to(shards.device), 0)
        return None
    full = torch.zeros(total, dtype=dtype, device=shards.device)
    for rank, (first, many) in enumerate(ranges.tolist()):
        if many and rank == 0 and part is not None:
            full[first : first + many] = part
        elif many and rank > 0:
            dist.recv(full[first : first + many], rank)
    return full


def same_masks(controller: TopologyController, masks: dict[str, Tensor]) -> bool:
    """Whether this rank's masks are those of another update."""
    for name, mask in controller.masks.items():
        mine = masks[name][mask.start : mask.start + mask.bits.numel]
        if not torch.equal(mask.bits.data, Bits.of(mine).data):
            return False
    return True
