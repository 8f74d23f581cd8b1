"""Which units have been active at any time of a run: a bit each, where masks have theirs."""

from collections.abc import Mapping

import torch

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.shards import Shards


class EverActive:
    """The union of every forward set A of a run, by layer (what ITOP counts).

    `bits` covers what this rank holds of each mask; None where it is not known any more: the run
    went on from a checkpoint that did not keep it.
    """

    def __init__(self) -> None:
        self.bits: dict[str, Bits] | None = {}

    def add(self, names: list[str], masks: Mapping[str, LayerMask]) -> None:
        """These layers have these masks now."""
        if self.bits is None:
            return
        for name in names:
            now, before = masks[name].bits, self.bits.get(name)
            self.bits[name] = now if before is None else before | now

    def counts(self, masks: Mapping[str, LayerMask], shards: Shards) -> dict[str, int]:
        """Units ever active in each layer, over all ranks; empty where not known. A collective."""
        if not self.bits:
            return {}
        names = list(masks)
        found = torch.stack([self.bits[name].count() for name in names])
        if any(mask.sharded for mask in masks.values()):
            found = shards.sum_over_ranks(found)
        return dict(zip(names, found.tolist(), strict=True))
