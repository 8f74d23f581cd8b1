"""The best units of many groups at once, with a count for each: N of each M weights, equal rows."""

import torch
from torch import Tensor

from sparse_gpt.topology.bits import chunk_size


def best_in_groups(keys: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """The `counts[g]` candidates of each group with the largest keys; ties go to the lower index.

    `keys`: integers of 0 or more, `[groups, width]`; `candidates`: bool of the same shape;
    `counts`: integers `[groups]`. Returns bool `[groups, width]`. Raises `ValueError` where a
    group has fewer candidates than it must take.
    """
    width = keys.shape[1]
    out = torch.empty_like(candidates)
    rank = torch.arange(width, device=keys.device)
    bad = torch.zeros((), dtype=torch.bool, device=keys.device)
    at_once = max(1, chunk_size(keys.device) // width)
    for start in range(0, keys.shape[0], at_once):
        part = slice(start, start + at_once)
        free, wanted = candidates[part], counts[part]
        bad |= ((wanted < 0) | (wanted > free.sum(1))).any()
        order = keys[part].masked_fill(~free, -1).sort(dim=1, descending=True, stable=True).indices
        out[part].scatter_(1, order, rank < wanted[:, None])
    if bad:
        raise ValueError("a group cannot give as many units as are to be chosen of it")
    return out
