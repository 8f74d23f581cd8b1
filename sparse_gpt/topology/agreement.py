"""Whether ranks have one topology (contracts 2 and 3): digests and counts, without a gather."""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.topology.bits import chunks
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.random import RandomKey
from sparse_gpt.topology.shards import Shards

Masks = Sequence[tuple[str, LayerMask]]


def _sharded(masks: Masks) -> bool:
    return any(mask.sharded for _, mask in masks)


def digest(masks: Masks, shards: Shards) -> str:
    """A digest of masks that does not depend on how they are spread. A collective.

    sha256 over sums of the random scores of the active units: sums can be made anywhere.
    """
    sums = torch.zeros(len(masks), 2, dtype=torch.int64, device=shards.device)
    for row, (name, mask) in zip(sums, masks):
        keys = [RandomKey.of(0, i, name) for i in range(2)]
        for start, stop in chunks(mask.bits.numel, mask.bits.data.device):
            flags = mask.bits.flags(start, stop).to(torch.int32).neg_()
            for i, key in enumerate(keys):
                scores = key.range(mask.start + start, mask.start + stop, flags.device)
                row[i] += (scores & flags).sum(dtype=torch.int64).to(row.device)
    if _sharded(masks):
        sums = shards.sum_over_ranks(sums)
    made = hashlib.sha256()
    for (name, _), row in zip(masks, sums.tolist()):
        made.update(f"{name}:{row[0]:x}:{row[1]:x};".encode())
    return made.hexdigest()


def check(masks: Masks, shards: Shards) -> None:
    """Raise if masks do not have the counts they must, or ranks disagree. A collective.

    Where every rank holds whole masks they must be equal.
    """
    if not masks:
        return
    if shards.replicated or not _sharded(masks):
        check_equal([mask.bits.data for _, mask in masks], shards)
    wrong = wrong_counts(masks, shards)
    if wrong:
        raise RuntimeError(f"the mask of {wrong[0]}: a bug")


def check_equal(tensors: Sequence[Tensor], shards: Shards) -> None:
    """Raise if some tensors of the topology are not the same on every rank. A collective."""
    if dist.get_world_size() == 1:
        return
    mine = hashlib.sha256()
    for tensor in tensors:
        mine.update(tensor.cpu().numpy().tobytes())
    number = int(mine.hexdigest()[:15], 16)
    low = torch.tensor([number, -number], dtype=torch.int64, device=shards.device)
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    if int(low[0]) != -int(low[1]):
        raise RuntimeError("the ranks' topologies differ: a bug, or a corrupted rank")


def wrong_counts(masks: Masks, shards: Shards) -> list[str]:
    """Masks that have not the active units they should, in words. A collective."""
    if not masks:
        return []
    found = torch.stack([mask.bits.count() for _, mask in masks])
    if _sharded(masks):
        found = shards.sum_over_ranks(found)
    return [
        f"{name} has not {mask.active} active units"
        for (name, mask), count in zip(masks, found.tolist(), strict=True)
        if count != mask.active
    ]
