"""What compactly stored layers grow by: gathered in backward passes, where there is no gradient of
weights that are not stored.

`exact`: the dense gradient of a layer, averaged over ranks and summed over micro-batches as the
engine does it. Each micro-batch's is summed over ranks at once, and a rank keeps its own range of
the flattened weight, in fp32. Of blocks only the score is kept once the last micro-batch is done:
with one micro-batch a step, no more than one layer's dense gradient is ever there.

`microbatch_norm`: the sum over micro-batches and ranks of the squared L2 norm of each block's
gradient. That is not the norm of the sum: blocks whose micro-batches disagree score higher.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.ops import BlockLayout, Growth
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.structure import BlockStructure


def sum_over_all(values: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over all ranks, whatever ZeRO does; ranks exchange on `device`."""
    return _over_all(values, device, dist.ReduceOp.SUM)


def max_over_all(values: Tensor, device: torch.device) -> Tensor:
    """The element-wise maximum over all ranks."""
    return _over_all(values, device, dist.ReduceOp.MAX)


def _over_all(values: Tensor, device: torch.device, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.get_world_size() == 1:
        return values
    there = values.to(device)
    dist.all_reduce(there, op=operation)
    return there.to(values.device)


def own_range(numel: int) -> tuple[int, int]:
    """`[first, last)` of `numel` positions that belong to this rank; firsts are multiples of 8.

    Of a rank that has none both are the multiple of 8 behind them.
    """
    size = _range_size(numel)
    first = min(-(-numel // 8) * 8, dist.get_rank() * size)
    return first, max(first, min(numel, first + size))


def _range_size(numel: int) -> int:
    return -(-numel // (8 * dist.get_world_size())) * 8


class GrowthScores(ABC):
    """The scores of one step's backward passes. `device`: where ranks exchange."""

    kind: Literal["dense", "norms"]

    def __init__(
        self,
        layouts: Mapping[str, BlockLayout],
        structure: BlockStructure,
        device: torch.device,
        micro_steps: int,
    ) -> None:
        self.layouts, self.structure, self.device = layouts, structure, device
        self.micro_steps = micro_steps
        self.held_bytes = self.peak_bytes = 0
        self._kept: dict[str, Tensor] = {}
        self._bad = False

    def of(self, name: str) -> Growth:
        """What a layer's backward passes are asked for."""
        return Growth(self.kind, partial(self._add, name))

    def is_finite(self) -> bool:
        """Whether all that this rank has is."""
        return not self._bad and all(bool(kept.isfinite().all()) for kept in self._kept.values())

    @abstractmethod
    def _add(self, name: str, found: Tensor) -> None: ...

    @abstractmethod
    def weights(self, name: str) -> Tensor:
        """fp32: this rank's `own_range` of a layer of single weights."""

    @abstractmethod
    def blocks(self, name: str) -> Tensor:
        """int64 `[blocks]`: a score of every block, the larger the better. A collective."""

    def _keep(self, name: str, value: Tensor | None, lent: int = 0) -> None:
        """Keep a tensor of a layer, or nothing; `lent`: bytes that are there besides."""
        old = self._kept.pop(name, None)
        if value is not None:
            self._kept[name] = value
        self.held_bytes += 0 if value is None else value.nbytes
        self.held_bytes -= 0 if old is None else old.nbytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes + lent)


class ExactGrowth(GrowthScores):
    """By the averaged dense gradient of the global batch."""

    kind = "dense"

    def __init__(self, *of_every_kind: Any) -> None:
        super().__init__(*of_every_kind)
        self._added: dict[str, int] = {}
        self._scores: dict[str, Tensor] = {}

    @torch.no_grad()
    def _add(self, name: str, found: Tensor) -> None:
        part = _reduced_range(found, self.device)
        mine = self._kept.get(name)
        lent = found.nbytes + 4 * found.numel()
        self._keep(name, part if mine is None else mine.add_(part), lent)
        self._added[name] = self._added.get(name, 0) + 1
        if self._added[name] < self.micro_steps or self.structure.unstructured:
            return
        try:
            self._scores[name] = self._score(name)
        except NonFiniteScores:  # on every rank
            self._bad = True
        self._keep(name, None)

    def _score(self, name: str) -> Tensor:
        shape = self.layouts[name].shape
        (scores,) = block_scores(
            [(own_range(shape[0] * shape[1])[0], self._kept[name])],
            [shape],
            self.structure.block,
            self.structure.score,
            partial(sum_over_all, device=self.device),
            partial(max_over_all, device=self.device),
            self._kept[name].device,
        )
        return scores

    def weights(self, name: str) -> Tensor:
        return self._kept[name]

    def blocks(self, name: str) -> Tensor:
        return self._scores[name]


class NormGrowth(GrowthScores):
    """By the squared norms of micro-batches' gradients, summed."""

    kind = "norms"

    @torch.no_grad()
    def _add(self, name: str, found: Tensor) -> None:
        mine = self._kept.get(name)
        self._keep(name, found.float().clone() if mine is None else mine.add_(found))

    def _summed(self, name: str) -> Tensor:
        return sum_over_all(self._kept[name].flatten(), self.device)

    def weights(self, name: str) -> Tensor:
        summed = self._summed(name)
        first, last = own_range(summed.numel())
        return summed[first:last]

    def blocks(self, name: str) -> Tensor:
        # Squares are not negative: their bits are ordered as they are.
        return self._summed(name).view(torch.int32).to(torch.int64)


def _reduced_range(gradient: Tensor, device: torch.device) -> Tensor:
    """fp32: this rank's range of a flattened gradient, averaged over ranks; a copy."""
    ranks, numel = dist.get_world_size(), gradient.numel()
    size = _range_size(numel)
    padded = torch.zeros(size * ranks, device=device)
    padded[:numel] = gradient.reshape(-1)
    if ranks == 1:
        return padded[:numel]
    part = torch.empty(size, device=device)
    dist.reduce_scatter_tensor(part, padded.div_(ranks))
    first, last = own_range(numel)
    return part[: last - first]


GROWTH_SCORES: dict[str, type[GrowthScores]] = {
    "exact": ExactGrowth,
    "microbatch_norm": NormGrowth,
}
