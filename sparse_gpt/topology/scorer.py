"""The units of layers, with the scores that an update compares: made where the weights lie."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.grouped import GroupedBlocks, GroupedUnits
from sparse_gpt.topology.methods import Method
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure, Groups
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, Units, UnitSet


class UnitMaker:
    """Makes `Units` of a structure, of whatever has been found out about the layers.

    `shapes`: `[out, in]` of every layer. `targets`: active units of each when its method is done,
    which groups share out.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        targets: Mapping[str, int],
        structure: BlockStructure,
        seed: int,
    ) -> None:
        self.structure, self.seed, self.shapes = structure, seed, dict(shapes)
        self._groups = {
            name: structure.groups(shapes[name], target) for name, target in targets.items()
        }

    def _groups_of(self, names: Sequence[str]) -> list[Groups]:
        groups = [self._groups[name] for name in names]
        return [of_layer for of_layer in groups if of_layer is not None]

    def weights(
        self,
        names: Sequence[str],
        index: int,
        parts: Sequence[LayerPart],
        reduce: Callable[[Tensor], Tensor],
        whole_model: bool = False,
    ) -> Units:
        """Single weights of layers; `index` numbers the update, 0 is the first topology."""
        key, groups = (self.seed, index), self._groups_of(names)
        if groups:
            return GroupedUnits(names, parts, reduce, key, groups)
        return ShardedUnits(names, parts, reduce, key, whole_model)

    def blocks(
        self,
        names: Sequence[str],
        index: int,
        scores: dict[str, list[Tensor]],
        whole_model: bool = False,
    ) -> Units:
        """Blocks of layers, with the scores that are there."""
        key, groups = (self.seed, index), self._groups_of(names)
        if groups:
            return GroupedBlocks(names, scores, key, groups)
        return BlockUnits(names, scores, key, whole_model)

    def draw(self, method: Method, targets: Mapping[str, int]) -> dict[str, Bits]:
        """A first topology that needs no weights: all units of each layer, from (seed, name).

        No collective: every rank comes to the same one.
        """
        drawn = {}
        for name, target in targets.items():
            rows, columns = self.structure.grid(self.shapes[name])
            total = rows * columns
            nothing = UnitSet([Bits.empty(total)], [0], [total])
            if self.structure.unstructured:
                part = LayerPart(0, torch.zeros(0))
                units = self.weights([name], 0, [part], lambda values: values)
            else:
                units = self.blocks([name], 0, {})
            counts = [method.active_after(0, target, total)]
            drawn[name] = method.start(units, ~nothing, counts).forward.parts[0]
        return drawn


class Scorer:
    """Makes the units of layers in masked storage, from shards.

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
        self.structure, self.shards, self.by_gradient = structure, shards, by_gradient
        self.shapes: dict[str, tuple[int, int]] = {}
        for name in targets:
            out_features, in_features = shards.shape(name)
            self.shapes[name] = (out_features, in_features)
        self._maker = UnitMaker(self.shapes, targets, structure, seed)

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
        if self.structure.unstructured:
            return self._maker.weights(names, index, parts, self.shards.sum_over_ranks, whole_model)
        scores = {}
        if scored:
            masters = [(part.start, part.master) for part in parts]
            scores["magnitude"] = self._block_scores(names, masters, whole_model)
        if dense:
            gradients = [(p.start, p.gradient) for p in parts if p.gradient is not None]
            scores["gradient"] = self._block_scores(names, gradients, whole_model)
        return self._maker.blocks(names, index, scores, whole_model)

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
