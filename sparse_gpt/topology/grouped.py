"""Units in groups that each keep their number: N of M weights, M x M tiles, equal rows.

Dropping compares the units of a layer, as without groups. Then

- a group of consecutive units grows as many as it lost, the best by the score among those that
  are inactive after the drop, the just-dropped ones included;
- a tile that lost weights is solved again: what was kept stays, and the growth scores of the rest
  sum to the most there is (M <= 8; a little less for larger M). There is always such a mask: the
  old one. Where a tile lost one weight it is the only one. Other tiles stay as they are.

Groups reach over the ends of a rank's part. So the scores of one layer at a time are put together
on every rank, and each solves the groups that its part lies in: the same ones in the same way.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.groups import best_in_groups
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.n_m import pinned, tile_benefits, tiles_of, transposable_mask, untiled
from sparse_gpt.topology.random import RandomKey
from sparse_gpt.topology.structure import Groups
from sparse_gpt.topology.units import BlockUnits, LayerPart, Score, ShardedUnits, Units, UnitSet


class _Grouped(Units):
    """What is common to units that are spread over ranks and to those that every rank knows."""

    groups: Sequence[Groups]

    def pattern(self, score: Score, of: UnitSet, counts: Sequence[int]) -> UnitSet:
        if of.sizes == list(counts):  # what is there is wanted, as in a dense phase
            return of
        if of.sizes != of.totals:
            raise RuntimeError("a pattern of groups is chosen from all units, not from some: a bug")
        nothing = ~of
        return self.grow(score, nothing, nothing, counts)

    def grow(self, score: Score, kept: UnitSet, active: UnitSet, counts: Sequence[int]) -> UnitSet:
        grown = [self._grown(score, i, kept, active) for i in range(len(self.names))]
        sizes = [
            groups.active(total) - size
            for groups, total, size in zip(self.groups, kept.totals, kept.sizes, strict=True)
        ]
        if sizes != list(counts):
            raise RuntimeError(f"groups grow {sizes} units, not {list(counts)}: a bug")
        return UnitSet(grown, sizes, kept.totals)

    def misfits(self, active: UnitSet) -> list[str]:
        return [
            name
            for i, (name, groups) in enumerate(zip(self.names, self.groups, strict=True))
            # A layer that is dense for a while has all its units.
            if active.sizes[i] != active.totals[i]
            and not _has_quota(self._whole(i, active), groups)
        ]

    @abstractmethod
    def _grown(self, score: Score, i: int, kept: UnitSet, active: UnitSet) -> Bits:
        """This rank's part of what layer i grows."""

    @abstractmethod
    def _whole(self, i: int, of: UnitSet) -> Tensor:
        """bool: which units of layer i are in a set, on every rank."""


def _has_quota(flags: Tensor, groups: Groups) -> bool:
    if not groups.tiles:
        return bool((flags.view(-1, groups.width).sum(1) == groups.quota).all())
    tiles = tiles_of(flags.view(-1, groups.columns), groups.width)
    return all(bool((tiles.sum(along) == groups.quota).all()) for along in (1, 2))


class GroupedUnits(_Grouped, ShardedUnits):
    """Single weights where they lie; of one layer at a time every rank sees all scores."""

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[LayerPart],
        reduce: Callable[[Tensor], Tensor],
        key: tuple[int, int],
        groups: Sequence[Groups],
    ) -> None:
        super().__init__(names, parts, reduce, key)
        self.groups = groups

    def _grown(self, score: Score, i: int, kept: UnitSet, active: UnitSet) -> Bits:
        groups, total, start = self.groups[i], kept.totals[i], self.parts[i].start
        stop, span = start + kept.parts[i].numel, groups.span
        # The groups that this rank's part lies in.
        first, last = start // span * span, -(-stop // span) * span
        old = keep = None
        if active.sizes[i]:
            both = kept.parts[i].flags() + 2 * active.parts[i].flags()
            flags = self._put_together(both, i, total)[first:last]
            keep, old = (flags & 1).bool(), (flags & 2).bool()
        keys = self._keys(score, i, kept, first, last)
        if groups.tiles:
            grown = _grown_tiles(keys, keep, old, groups, score == "random")
        else:
            grown = _grown_groups(keys, keep, groups)
        return Bits.of(grown[start - first : stop - first])

    def _keys(self, score: Score, i: int, of: UnitSet, first: int, last: int) -> Tensor:
        """int32 keys of positions `[first, last)` of a layer; the larger the better."""
        if score == "random":  # every rank knows all of them
            device = of.parts[i].data.device
            return RandomKey.of(*self.key, self.names[i]).range(first, last, device)
        source = self._source(score, i, of, 0)
        keys = self._put_together(source.keys(0, source.numel), i, source.total)
        finite = source.is_finite(keys)
        if finite is not None and not finite:
            raise NonFiniteScores
        return keys[first:last]

    def _put_together(self, part: Tensor, i: int, total: int) -> Tensor:
        """What all ranks have of a layer. A collective."""
        start = self.parts[i].start
        whole = torch.zeros(total, dtype=part.dtype, device=part.device)
        whole[start : start + part.numel()] = part
        return self.reduce(whole)

    def _whole(self, i: int, of: UnitSet) -> Tensor:
        return self._put_together(of.parts[i].flags(), i, of.totals[i]).view(torch.bool)


class GroupedBlocks(_Grouped, BlockUnits):
    """Blocks, with as many in every row of their grid: every rank knows all scores."""

    def __init__(
        self,
        names: Sequence[str],
        scores: dict[str, list[Tensor]],
        key: tuple[int, int],
        groups: Sequence[Groups],
    ) -> None:
        super().__init__(names, scores, key)
        self.groups = groups

    def _grown(self, score: Score, i: int, kept: UnitSet, active: UnitSet) -> Bits:
        places = torch.arange(kept.totals[i], device=kept.parts[i].data.device)
        keep = self._whole(i, kept) if kept.sizes[i] else None
        return Bits.of(_grown_groups(self._keys(score, i, places), keep, self.groups[i]))

    def _whole(self, i: int, of: UnitSet) -> Tensor:
        return of.parts[i].flags().view(torch.bool)


def _grown_groups(keys: Tensor, kept: Tensor | None, groups: Groups) -> Tensor:
    """bool `[n]`: what fills the groups up to their quota. `kept` None: nothing."""
    kept = torch.zeros_like(keys, dtype=torch.bool) if kept is None else kept
    kept = kept.view(-1, groups.width)
    missing = groups.quota - kept.sum(1)
    return best_in_groups(keys.view(-1, groups.width), ~kept, missing).view(-1)


def _grown_tiles(
    keys: Tensor, kept: Tensor | None, old: Tensor | None, groups: Groups, random: bool
) -> Tensor:
    """bool `[n]`: what fills tiles up. `kept` and `old` None: all of them, from nothing."""
    m, columns = groups.width, groups.columns
    tiles = tiles_of(keys.view(-1, columns), m)
    if kept is None or old is None:
        mask = transposable_mask(tile_benefits(tiles, random), groups.quota)
        return untiled(mask, columns).view(-1)
    kept, mask = tiles_of(kept.view(-1, columns), m), tiles_of(old.view(-1, columns), m)
    lost = (mask & ~kept).any(2).any(1).nonzero().view(-1)
    benefit = pinned(tile_benefits(tiles[lost], random), kept[lost])
    solved = mask.clone()
    solved[lost] = transposable_mask(benefit, groups.quota, mask[lost])
    return untiled(solved & ~kept, columns).view(-1)
