"""From scores to the first topology: an exact number of units, compared across the whole model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, Units, UnitSet

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Choice:
    """What is compared: the layers, their shapes and units, and how ranks exchange.

    `reduce_sum` and `reduce_max` go over what ranks hold of the scores, each position counted once.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    structure: BlockStructure
    reduce_sum: Reduce
    reduce_max: Reduce
    device: torch.device

    @property
    def totals(self) -> list[int]:
        """Units of every layer."""
        grids = [self.structure.grid(shape) for shape in self.shapes]
        return [rows * columns for rows, columns in grids]


def choose(
    choice: Choice, parts: Sequence[tuple[int, Tensor]], total: int, signed: bool = False
) -> UnitSet:
    """`total` units of the layers together: the best of each layer, then the best of all others.

    `parts[i]`: start and scores (1-D, finite) of this rank's elements of layer i; larger is
    better, ties go to the earlier layer and the lower index. So every layer keeps at least one
    unit, and where each has one among the model's best the choice is the plain top-k. Scores are
    magnitudes, or with `signed` numbers of either sign (single weights only). The score of a
    block is the structure's (L2 norm or maximum) over those of its weights. A collective; raises
    `ValueError` on every rank where `total` does not suit the layers.
    """
    totals, layers = choice.totals, len(choice.names)
    if not layers <= total <= sum(totals):
        raise ValueError(f"cannot choose {total} of {sum(totals)} units in {layers} layers")
    sharded = choice.structure.unstructured
    sizes = [part[1].numel() for part in parts] if sharded else totals
    nothing = UnitSet([Bits.empty(n, choice.device) for n in sizes], [0] * layers, totals)
    good, rest = ~nothing, nothing
    if signed:
        positive = [Bits.of(score > 0) for _, score in parts]
        counts = choice.reduce_sum(torch.stack([bits.count() for bits in positive])).tolist()
        good = UnitSet(positive, counts, totals)
        rest = ~nothing - good
    by_layer, by_model = _units(choice, parts)
    # What is not positive ranks behind, the smallest magnitude first.
    many = [min(1, size) for size in good.sizes]
    first = by_layer.best("largest gradient", good, many)
    last = by_layer.best("smallest magnitude", rest, [1 - count for count in many])
    chosen = first | last
    good, rest = good - first, rest - last
    k = min(total - layers, sum(good.sizes))
    chosen |= by_model.best("largest gradient", good, [k])
    return chosen | by_model.best("smallest magnitude", rest, [total - layers - k])


def _units(choice: Choice, parts: Sequence[tuple[int, Tensor]]) -> tuple[Units, Units]:
    """The scored units, compared in every layer and across the model."""
    key = (0, 0)  # nothing is drawn
    if choice.structure.unstructured:
        places = [LayerPart(start, score, score) for start, score in parts]
        by_layer, by_model = (
            ShardedUnits(choice.names, places, choice.reduce_sum, key, whole_model)
            for whole_model in (False, True)
        )
        return by_layer, by_model
    found = block_scores(
        parts,
        choice.shapes,
        choice.structure.block,
        choice.structure.score,
        choice.reduce_sum,
        choice.reduce_max,
        choice.device,
        common_scale=True,
    )
    scores = {"gradient": found, "magnitude": found}
    return BlockUnits(choice.names, scores, key), BlockUnits(choice.names, scores, key, True)
