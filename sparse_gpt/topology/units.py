"""What methods say their updates in: sets of units, and the best of them by a score.

A unit is what is kept or dropped together: a weight, or a block. The same words work on units
that are spread over ranks (unstructured) and on units that every rank knows (blocks).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import LargestMagnitude, Random, SmallestMagnitude, Source
from sparse_gpt.topology.random import RandomKey
from sparse_gpt.topology.select import select_top

Score = Literal["smallest magnitude", "largest magnitude", "largest gradient", "random"]


@dataclass(frozen=True)
class UnitSet:
    """Units of every layer of a batch: what this rank holds of them, and how many there are.

    `sizes` and `totals` count over all ranks: members of the set, and units of the layer.
    """

    parts: list[Bits]
    sizes: list[int]
    totals: list[int]

    def __sub__(self, subset: "UnitSet") -> "UnitSet":
        """Without the members of a subset."""
        parts = [mine - other for mine, other in zip(self.parts, subset.parts, strict=True)]
        sizes = [mine - other for mine, other in zip(self.sizes, subset.sizes, strict=True)]
        return UnitSet(parts, sizes, self.totals)

    def __or__(self, disjoint: "UnitSet") -> "UnitSet":
        """With the members of a set that shares none with this one."""
        parts = [mine | other for mine, other in zip(self.parts, disjoint.parts, strict=True)]
        sizes = [mine + other for mine, other in zip(self.sizes, disjoint.sizes, strict=True)]
        return UnitSet(parts, sizes, self.totals)

    def __invert__(self) -> "UnitSet":
        sizes = [total - size for total, size in zip(self.totals, self.sizes, strict=True)]
        return UnitSet([~part for part in self.parts], sizes, self.totals)


class Units(ABC):
    """The units of a batch of layers. `whole_model`: they are compared across its layers.

    `key`: seed and number of the update, which random scores depend on.
    """

    def __init__(self, names: Sequence[str], key: tuple[int, int], whole_model: bool) -> None:
        self.names, self.key, self.whole_model = list(names), key, whole_model

    def share(self, members: UnitSet, fraction: float) -> list[int]:
        """How many units a fraction of a set is, rounded down: a layer, or in the whole model."""
        if self.whole_model:
            return [int(fraction * sum(members.sizes))]
        return [int(fraction * size) for size in members.sizes]

    @abstractmethod
    def best(self, score: Score, of: UnitSet, counts: Sequence[int]) -> UnitSet:
        """The first `counts` units of a set by a score; ties go to the lower index. A collective.

        `counts`: one a layer, or one in all for the whole model. Raises `ValueError` on every
        rank where a count is out of range or a score is not finite.
        """

    def pattern(self, score: Score, of: UnitSet, counts: Sequence[int]) -> UnitSet:
        """The best `counts` units of a set that the structure allows to be active together."""
        return self.best(score, of, counts)

    def grow(self, score: Score, kept: UnitSet, active: UnitSet, counts: Sequence[int]) -> UnitSet:
        """The best `counts` units to add to what was kept of the active ones.

        Together they are a pattern that the structure allows, as the active ones were.
        """
        return self.best(score, ~kept, counts)

    def misfits(self, active: UnitSet) -> list[str]:
        """Names of layers whose units the structure does not allow to be active together."""
        return []


@dataclass(frozen=True)
class LayerPart:
    """This rank's weights of a layer: 1-D, elements `start .. start + n - 1` of the flat weight."""

    start: int
    master: Tensor
    gradient: Tensor | None = None


class ShardedUnits(Units):
    """Single weights, where they lie: no weight, score or mask bit leaves its rank."""

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[LayerPart],
        reduce: Callable[[Tensor], Tensor],
        key: tuple[int, int],
        whole_model: bool = False,
    ) -> None:
        """`reduce` sums a tensor over ranks, and returns it."""
        super().__init__(names, key, whole_model)
        self.parts, self.reduce = list(parts), reduce

    def best(self, score: Score, of: UnitSet, counts: Sequence[int]) -> UnitSet:
        sources: list[Source] = []
        base = 0
        for i in range(len(self.names)):
            sources.append(self._source(score, i, of, base))
            base += of.totals[i] if self.whole_model else 0
        if not self.whole_model:
            groups, sizes = [[source] for source in sources], of.sizes
        else:
            groups, sizes = [sources], [sum(of.sizes)]
        chosen = [
            bits for group in select_top(groups, counts, sizes, self.reduce) for bits in group
        ]
        return UnitSet(chosen, self._sizes(chosen, counts), of.totals)

    def _source(self, score: Score, i: int, of: UnitSet, base: int) -> Source:
        part, place = self.parts[i], (of.parts[i], self.parts[i].start, of.totals[i], base)
        if score == "random":
            return Random(RandomKey.of(*self.key, self.names[i]), *place)
        if score == "smallest magnitude":
            return SmallestMagnitude(part.master, *place)
        if score == "largest magnitude":
            return LargestMagnitude(part.master, *place)
        if part.gradient is None:
            raise ValueError(f"{self.names[i]}: this step has no dense gradient")
        return LargestMagnitude(part.gradient, *place)

    def _sizes(self, chosen: Sequence[Bits], counts: Sequence[int]) -> list[int]:
        if not self.whole_model:
            return list(counts)
        sizes = self.reduce(torch.stack([bits.count() for bits in chosen])).tolist()
        if sum(sizes) != counts[0]:
            raise RuntimeError(f"{sum(sizes)} units were chosen, not {counts[0]}: a bug")
        return sizes


class BlockUnits(Units):
    """Blocks: every rank holds all their scores, and comes to the same choice by itself."""

    def __init__(
        self,
        names: Sequence[str],
        scores: dict[str, list[Tensor]],
        key: tuple[int, int],
        whole_model: bool = False,
    ) -> None:
        """`scores["magnitude"]` and `["gradient"]`: int64 `[blocks]` of every layer, canonical."""
        super().__init__(names, key, whole_model)
        self.scores = scores

    def best(self, score: Score, of: UnitSet, counts: Sequence[int]) -> UnitSet:
        groups = [range(len(self.names))] if self.whole_model else [[i] for i in range(len(counts))]
        chosen = [Bits.empty(bits.numel, bits.data.device) for bits in of.parts]
        for group, count in zip(groups, counts, strict=True):
            places = [of.parts[i].positions() for i in group]
            if not 0 <= count <= sum(place.numel() for place in places):
                raise ValueError(f"cannot choose {count} of {sum(map(len, places))} candidates")
            keys = [self._keys(score, i, place) for i, place in zip(group, places)]
            order = torch.sort(torch.cat(keys), descending=True, stable=True).indices[:count]
            taken = torch.zeros(sum(map(len, places)), dtype=torch.bool, device=order.device)
            taken[order] = True
            for i, place, mine in zip(group, places, taken.split([len(p) for p in places])):
                chosen[i].add_(place[mine])
        return UnitSet(chosen, [int(bits.count()) for bits in chosen], of.totals)

    def _keys(self, score: Score, i: int, place: Tensor) -> Tensor:
        if score == "random":
            return RandomKey.of(*self.key, self.names[i]).scores(place).to(torch.int64)
        if score == "smallest magnitude":
            return -self.scores["magnitude"][i][place]
        if score == "largest magnitude":
            return self.scores["magnitude"][i][place]
        return self.scores["gradient"][i][place]
