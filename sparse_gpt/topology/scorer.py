"""The units of layers, with the scores that an update compares: made where the weights lie."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.grouped import GroupedBlocks, GroupedUnits
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, Units


class Scorer:
    """Makes `Units` of a structure from shards.

    `targets`: active units of each layer when its method is done, which groups share out.
    `by_gradient`: whether updates grow by the dense gradient of the step they are in.
    """

    def __init__(
        self,
        targets: Mapping[str, int],
        structure: BlockStructure,
        shards: Shards,
        seed: int,
        by_gradient: bool,
    ) -> None:
        self.structure, self.shards = structure, shards
        self.seed, self.by_gradient = seed, by_gradient
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in targets:
            out_features, in_features = shards.shape(name)
            self.shapes[name] = (out_features, in_features)
        self._groups = {
            name: structure.groups(self.shapes[name], target) for name, target in targets.items()
        }

    def units(self, names: list[str], index: int, scored: bool, whole_model: bool) -> Units:
        """The units of some layers; `index` numbers the update, 0 is the first topology.

        `scored`: with magnitudes, and in an update with the gradients that are there then.
        """
        parts: list[LayerPart] = []
        empty = torch.zeros(0, device=self.shards.state_device)
        dense = scored and self.by_gradient and index > 0
        for name in names:
            fragment = self.shards.fragment(name)
            if fragment is None:
                parts.append(LayerPart(0, empty, empty if dense else None))
            else:
                gradient = self.shards.stepped_gradient(fragment) if dense else None
                parts.append(LayerPart(fragment.start, fragment.master, gradient))
        key = (self.seed, index)
        groups = [self._groups[name] for name in names]
        groups = [of_layer for of_layer in groups if of_layer is not None]
        if self.structure.unstructured:
            if groups:
                return GroupedUnits(names, parts, self.shards.sum_over_ranks, key, groups)
            return ShardedUnits(names, parts, self.shards.sum_over_ranks, key, whole_model)
        scores = {}
        if scored:
            masters = [(part.start, part.master) for part in parts]
            scores["magnitude"] = self._block_scores(names, masters, whole_model)
        if dense:
            gradients = [(p.start, p.gradient) for p in parts if p.gradient is not None]
            scores["gradient"] = self._block_scores(names, gradients, whole_model)
        if groups:
            return GroupedBlocks(names, scores, key, groups)
        return BlockUnits(names, scores, key, whole_model)

    def _block_scores(
        self, names: list[str], parts: list[tuple[int, Tensor]], whole_model: bool
    ) -> list[Tensor]:
        return block_scores(
            parts,
            [self.shapes[name] for name in names],
            self.structure.block,
            self.structure.score,
            self.shards.sum_over_ranks,
            self.shards.max_over_ranks,
            self.shards.state_device,
            common_scale=whole_model,
        )
