"""The controller over compact storage: a topology update rewrites slots.

A parameter is the values of a layer's active blocks, so gradients, moments and shards are too, and
there is nothing to mask. Every rank holds where the blocks lie (`ops.BlockLayout`): its kernels
need all of it. An update chooses as it does over masked storage, by the same code and so the same
units. Magnitudes come from the slots that ranks own: of blocks their scores are exchanged; of
single weights a layer's active values, one layer at a time, and each rank compares its own range
of canonical positions. What was dropped gives its slots to what was grown, in order: an edit of
the shards where they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.ops import BlockLayout
from sparse_gpt.topology import agreement
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.growth import GROWTH_SCORES, GrowthScores, own_range, sum_over_all
from sparse_gpt.topology.interfaces import UpdateReport
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.methods import Sets
from sparse_gpt.topology.scorer import UnitMaker
from sparse_gpt.topology.shards import Fragment, Shards
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import LayerPart, Units, UnitSet


@dataclass(frozen=True)
class DrawnMasks:
    """A first topology, which every rank holds, as `SavedMasks`."""

    bits: Mapping[str, Bits]

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """See `SavedMasks.mask`."""
        return self.bits[name].flags()[start : start + count].view(torch.bool)


class SlotScorer:
    """Makes the units of layers in compact storage."""

    def __init__(
        self,
        layouts: Mapping[str, BlockLayout],
        targets: Mapping[str, int],
        structure: BlockStructure,
        shards: Shards,
        seed: int,
    ) -> None:
        self.layouts, self.structure, self.shards = layouts, structure, shards
        self.shapes = {name: layout.shape for name, layout in layouts.items()}
        self.growth: GrowthScores | None = None  # of the step an update is in, if it needs any
        self._maker = UnitMaker(self.shapes, targets, structure, seed)

    def units(self, names: list[str], index: int, scored: bool, whole_model: bool) -> Units:
        """See `Scorer.units`; layers are never compared with each other here."""
        if whole_model:
            raise RuntimeError("compact storage has no updates across layers: a bug")
        if self.structure.unstructured:
            parts = [self._weights(name, scored) for name in names]
            reduce = partial(sum_over_all, device=self.shards.device)
            return self._maker.weights(names, index, parts, reduce)
        scores = {}
        if scored:
            scores["magnitude"] = self._magnitudes(names)
        if scored and self.growth is not None:
            device = self.shards.state_device
            scores["gradient"] = [self.growth.blocks(name).to(device) for name in names]
        return self._maker.blocks(names, index, scores)

    def _weights(self, name: str, scored: bool) -> LayerPart:
        """This rank's range of a layer of single weights, zeros included."""
        layout, device = self.layouts[name], self.shards.state_device
        first, last = own_range(layout.shape[0] * layout.shape[1])
        if not scored:
            return LayerPart(first, torch.zeros(0, device=device))
        weights = torch.zeros(last - first, device=device)
        slots = layout.slots.to(device, torch.int64)
        mine = (slots >= first) & (slots < last)
        weights[slots[mine] - first] = self._slot_values(name)[mine]
        gradient = None if self.growth is None else self.growth.weights(name).to(device)
        return LayerPart(first, weights, gradient)

    def _slot_values(self, name: str) -> Tensor:
        """fp32 `[slots]`: the weights of a layer, on every rank. A collective."""
        values = torch.zeros(self.layouts[name].count, device=self.shards.state_device)
        fragment = self.shards.fragment(name)
        if fragment is not None:
            values[fragment.start : fragment.start + fragment.numel] = fragment.master
        return self.shards.sum_over_ranks(values)

    def _magnitudes(self, names: list[str]) -> list[Tensor]:
        """int64 `[blocks]` of every layer: scores of its blocks, 0 of those without a slot."""
        fragments = [self.shards.fragment(name) for name in names]
        out_size, in_size = self.structure.block
        layouts = [self.layouts[name] for name in names]
        of_slots = block_scores(
            [None if f is None else (f.start, f.master) for f in fragments],
            [(layout.count * out_size, in_size) for layout in layouts],  # a block below the other
            self.structure.block,
            self.structure.score,
            self.shards.sum_over_ranks,
            self.shards.max_over_ranks,
            self.shards.state_device,
        )
        scores = []
        for layout, found in zip(layouts, of_slots, strict=True):
            every = found.new_zeros(layout.grid[0] * layout.grid[1])
            every[layout.slots.to(found.device, torch.int64)] = found
            scores.append(every)
        return scores


class CompactController(TopologyController):
    """`TopologyController` of layers in compact storage.

    `saved` must be given: parameters have the size of the first topology, so it was drawn before
    the model was built (`UnitMaker.draw`) or read. `growth_score`: a name of `GROWTH_SCORES`;
    `micro_steps`: backward passes of a step.
    """

    def __init__(self, *args: Any, growth_score: str, micro_steps: int, **more: Any) -> None:
        self._growth_score, self._micro_steps = growth_score, micro_steps
        super().__init__(*args, **more)

    @property
    def layouts(self) -> dict[str, BlockLayout]:
        found = {}
        for name, layer in self.layers.items():
            assert layer.layout is not None
            found[name] = layer.layout
        return found

    def _make_scorer(self) -> SlotScorer:
        self._slots = SlotScorer(self.layouts, self.targets, self.structure, self.shards, self.seed)
        return self._slots

    def _empty_mask(self, name: str) -> LayerMask:
        layout = self.layouts[name]
        bits = Bits.empty(layout.grid[0] * layout.grid[1], self.shards.state_device)
        return LayerMask(layout.shape, layout.block, bits, 0, 0, whole=True)

    def zero_outside(self) -> None:
        """Nothing is stored outside."""

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of step t: ask for what weights grow by, if it is due."""
        self._slots.growth = None
        if self.grows_by_gradient(step):
            made = GROWTH_SCORES[self._growth_score]
            device = self.shards.device
            self._slots.growth = made(self.layouts, self.structure, device, self._micro_steps)
        for name, layer in self.layers.items():
            growth = self._slots.growth
            layer.growth = None if growth is None else growth.of(name)

    def before_step(self, step: int) -> Tensor:
        """See `TopologyController.before_step`; gradients are of active weights as they come."""
        finite = torch.ones((), dtype=torch.bool, device=self.shards.device)
        self.shards.settle()
        for _, _, gradient in self._gradients():
            finite &= torch.isfinite(torch.linalg.vector_norm(gradient.float())).to(finite.device)
        growth = self._slots.growth
        return finite if growth is None else finite & growth.is_finite()

    def after_step(self, optimizer: Any) -> UpdateReport | None:
        report, growth = super().after_step(optimizer), self._slots.growth
        if report is not None and growth is not None:
            report = replace(report, growth_bytes=growth.peak_bytes)
        self._slots.growth = None
        for layer in self.layers.values():
            layer.growth = None
        return report

    def _update(self, names: list[str], step: int) -> None:
        # Single weights a layer at a time: every rank sees all the active ones of a layer.
        batches = [[name] for name in names] if self.structure.unstructured else [names]
        for batch in batches:
            super()._update(batch, step)

    def _spread(self, units: UnitSet) -> UnitSet:
        if not self.structure.unstructured:
            return units
        parts = []
        for bits in units.parts:
            first, last = own_range(bits.numel)
            parts.append(Bits(bits.data[first // 8 : -(-last // 8)], last - first))
        return UnitSet(parts, units.sizes, units.totals)

    def _join(self, units: UnitSet) -> UnitSet:
        if not self.structure.unstructured:
            return units
        joined = []
        for part, total in zip(units.parts, units.totals, strict=True):
            whole = Bits.empty(total, part.data.device)
            first = own_range(total)[0] // 8
            whole.data[first : first + part.data.numel()] = part.data
            joined.append(Bits(sum_over_all(whole.data, self.shards.device), total))
        return UnitSet(joined, units.sizes, units.totals)

    def _install(
        self,
        names: list[str],
        new: Sets,
        old: list[LayerMask] | None = None,
        reset_moments: bool = False,
    ) -> None:
        for i, name in enumerate(names):
            self.masks[name] = self._with(self.masks[name], new.forward, i)
            layout, bits = self.layouts[name], new.forward.parts[i]
            if old is None:
                if new.forward.sizes[i] != layout.count:
                    raise UserError(
                        f"the saved mask of {name} has {new.forward.sizes[i]} active units, but "
                        f"{layout.count} are stored"
                    )
                layout.rewrite(bits.positions().to(layout.slots.device))
                continue
            dropped, grown = old[i].bits - bits, bits - old[i].bits
            self._rewrite(name, dropped, grown.positions())

    def _rewrite(self, name: str, dropped: Bits, grown: Tensor) -> None:
        """Give the slots of dropped units to grown ones, which start at 0 with zero moments."""
        layout = self.layouts[name]
        slots = layout.slots.to(grown.device, torch.int64)
        places = dropped.at(slots).nonzero().view(-1)
        if places.numel() != grown.numel():
            raise RuntimeError(f"{name}: {grown.numel()} units for {places.numel()} slots: a bug")
        if not places.numel():
            return
        slots[places] = grown
        layout.rewrite(slots.to(layout.slots.device))
        fragment = self.shards.fragment(name)
        if fragment is not None:
            _zero_slots(fragment, places, layout.block[0] * layout.block[1])

    def set_slots(self, name: str, slots: Tensor) -> None:
        """The slots of the present topology in the order of a checkpoint, integers `[slots]`.

        Raises `UserError` where they are not of this topology.
        """
        layout = self.layouts[name]
        wanted = slots.to(layout.slots.device)
        if wanted.shape != layout.slots.shape or not torch.equal(
            wanted.sort().values.to(torch.int64), layout.slots.sort().values.to(torch.int64)
        ):
            raise UserError(f"the saved slots of {name} are not those of its mask")
        layout.rewrite(wanted)

    def check_agreement(self) -> None:
        """Raise if masks or slots are not what they must be, or ranks disagree. A collective."""
        super().check_agreement()
        agreement.check_equal([layout.slots for layout in self.layouts.values()], self.shards)


def _zero_slots(fragment: Fragment, places: Tensor, size: int) -> None:
    """Zero what a fragment holds of some slots of `size` values each."""
    inside = torch.arange(size, device=places.device)
    elements = (places[:, None] * size + inside).view(-1) - fragment.start
    elements = elements[(elements >= 0) & (elements < fragment.numel)]
    for tensor in fragment.tensors().values():
        tensor.index_fill_(0, elements.to(tensor.device), 0)
