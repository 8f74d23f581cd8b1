"""Keeps the topology of a model, and moves it inside the optimizer step.

    begin_step    before the first micro-batch: dense weight gradients, if kernels must be asked
    before_step   averaged gradients are there: zero them outside the trained set B, unless this
                  step grows by them
    engine.step   clip, Adam; then, in `optimizer.step` and before the weights reach the model:
                  drop, grow, and zero weights and moments outside the new mask
    after_step    what was done

On a step that grows by gradient Adam runs on the dense gradient. What that leaves outside the mask
is zeroed right after, and its arithmetic is per weight, so the trained weights do not notice; in
return no gradient has to be kept, and masks never travel: DeepSpeed sends the weights anyway.

For static, SET and RigL the forward set A, the trained set B and the stored set C are the same.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import Pattern
from sparse_gpt.topology.bits import Bits, chunks
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.grouped import GroupedBlocks, GroupedUnits
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.methods import Method
from sparse_gpt.topology.random import RandomKey
from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, Units, UnitSet


@dataclass(frozen=True)
class UpdateReport:
    """One topology update: active units, how many were dropped, and how many of those stayed out.

    `churn` is the share of active units that are new.
    """

    active: int
    dropped: int
    replaced: int

    @property
    def churn(self) -> float:
        return self.replaced / max(1, self.active)


class SavedMasks(Protocol):
    """Where masks are read from: a checkpoint."""

    def mask(self, name: str, start: int, count: int) -> Tensor:
        """bool `[count]`: units `start .. start + count - 1` of a layer's mask."""
        ...


class TopologyController:
    """The topology of every sparse layer of a model, over whatever shards it lives in.

    `layers`: sparse layers by the name of their weight. `units`: active units of each at the
    start, whose masks are random or `saved`. Masters are masked; `Shards.push_masters` is left to
    the caller. `whole_model`: updates compare units across layers. `hold_step`: whether an update
    replaces the optimizer step (RigL as published) or follows it. `show_patterns`: whether the
    layers' kernels need to see the pattern; a dense product over zeros does not.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        units: dict[str, int],
        structure: BlockStructure,
        method: Method,
        schedule: UpdateSchedule,
        seed: int,
        shards: Shards,
        saved: SavedMasks | None = None,
        whole_model: bool = False,
        hold_step: bool = False,
        show_patterns: bool = False,
    ) -> None:
        self.layers, self.structure, self.method = layers, structure, method
        self.schedule, self.seed, self.shards = schedule, seed, shards
        self.whole_model, self.replaces_step = whole_model, hold_step
        self.show_patterns = show_patterns
        self.masks: dict[str, LayerMask] = {}
        self._groups = {n: structure.groups(_matrix(shards, n), units[n]) for n in layers}
        self._batches = [[n for n in batch if n in layers] for batch in shards.batches()]
        if whole_model and sum(map(bool, self._batches)) > 1:
            raise RuntimeError("the layers of one selection are in several optimizer steps: a bug")
        self._next_batch = 0
        self._report: UpdateReport | None = None
        self._dense_gradients = False
        if saved is None:
            self._draw(units)
        else:
            self.load(self.read(saved), units)

    def _draw(self, counts: dict[str, int]) -> None:
        """The first topology: random masks of exact counts, from (seed, layer name)."""
        names = list(self.layers)
        empty = {name: self._empty_mask(name) for name in names}
        units = self._units(names, 0, scored=False, whole_model=False)
        nothing = UnitSet(
            [empty[n].bits for n in names], [0] * len(names), [empty[n].units for n in names]
        )
        drawn = units.pattern("random", ~nothing, [counts[name] for name in names])
        self.masks = empty
        self._install(names, drawn)

    def read(self, saved: SavedMasks) -> dict[str, Bits]:
        """What this rank holds of saved masks. Changes nothing; no collective."""
        read = {}
        for name in self.layers:
            mask = self._empty_mask(name)
            flags = saved.mask(name, mask.start, mask.bits.numel)
            read[name] = Bits.of(flags).to(self.shards.state_device)
        return read

    def load(self, read: dict[str, Bits], counts: dict[str, int]) -> None:
        """Replace the topology by one that was read, with its number of active units.

        Zeroes masters and moments outside. A collective; every rank raises `UserError` where a
        mask has another number.
        """
        names = list(self.layers)
        self.masks = {name: self._empty_mask(name) for name in names}
        totals = [self.masks[name].units for name in names]
        loaded = UnitSet([read[name] for name in names], [counts[n] for n in names], totals)
        self._install(names, loaded)
        wrong = self._wrong_counts()
        if wrong:
            raise UserError(f"the saved mask of {wrong[0]} has not {counts[wrong[0]]} active units")
        misfits = self._units(names, 0, scored=False, whole_model=False).misfits(loaded)
        if misfits:
            raise UserError(
                f"the saved mask of {misfits[0]} has not the same number in every group; keep "
                "sparsity.structure as it was"
            )
        self.check_agreement()

    def zero_outside(self) -> None:
        """Zero masters and moments outside the masks."""
        for name, mask in self.masks.items():
            fragment = self.shards.fragment(name)
            if fragment is not None:
                mask.zero_outside_(list(fragment.tensors().values()), fragment.start)

    def _empty_mask(self, name: str) -> LayerMask:
        shape, fragment = _matrix(self.shards, name), self.shards.fragment(name)
        rows, columns = self.structure.grid(shape)
        start, numel = 0, rows * columns
        if self.structure.unstructured:
            start = 0 if fragment is None else fragment.start
            numel = 0 if fragment is None else fragment.numel
        bits = Bits.empty(numel, self.shards.state_device)
        return LayerMask(shape, self.structure.block, bits, start, 0)

    def is_update(self, step: int) -> bool:
        """Whether the topology changes at step t (from 1)."""
        return self.method.dynamic and bool(self.layers) and self.schedule.is_update(step)

    def grows_by_gradient(self, step: int) -> bool:
        """Whether step t needs dense weight gradients."""
        return self.is_update(step) and self.method.growth == "gradient"

    def holds_step(self, step: int) -> bool:
        """Whether the optimizer step of step t is replaced by a topology update."""
        return self.replaces_step and self.is_update(step)

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of step t: choose active or dense weight gradients."""
        for layer in self.layers.values():
            layer.dense_grad = self.grows_by_gradient(step)

    def before_step(self, step: int) -> Tensor:
        """At the accumulation boundary: zero the gradient outside B, unless weights grow by it.

        Returns a 0-d bool tensor: whether this rank's gradients of sparse layers were finite, in
        B and outside.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.shards.device)
        self.shards.settle()
        self._dense_gradients = self.grows_by_gradient(step)
        for name, fragment, gradient in self._gradients():
            finite &= torch.isfinite(torch.linalg.vector_norm(gradient.float())).to(finite.device)
            if not self._dense_gradients:
                self.masks[name].zero_outside_(gradient, fragment.start)
        return finite

    def _gradients(self) -> Iterator[tuple[str, Any, Tensor]]:
        for name in self.layers:
            fragment, gradient = self.shards.fragment(name), self.shards.gradient(name)
            if fragment is not None and gradient is not None and fragment.numel:
                yield name, fragment, gradient

    def square_sum(self, name: str, gradient: Tensor) -> Tensor:
        """0-d fp64: squares of this rank's part of a gradient, of trained weights only."""
        if name in self.masks and self._dense_gradients:
            fragment = self.shards.fragment(name)
            assert fragment is not None
            return self.masks[name].square_sum(gradient, fragment.start)
        return torch.linalg.vector_norm(gradient.float()).double() ** 2

    def arm(self, step: int, finite: bool, optimizer: Any) -> None:
        """Before `engine.step` of step t: let the topology move in it, if t is a finite update."""
        self._report, self._next_batch = None, 0
        if finite and self.is_update(step):
            self._report = UpdateReport(0, 0, 0)
            optimizer.on_stepped = lambda: self._on_stepped(step)

    def after_step(self, optimizer: Any) -> UpdateReport | None:
        """After `engine.step`: what the update did, or None where there was none. A collective."""
        optimizer.on_stepped = None
        report, self._report = self._report, None
        if report is not None:
            if self._next_batch != len(self._batches):
                raise RuntimeError(
                    f"DeepSpeed made {self._next_batch} optimizer steps, not {len(self._batches)}"
                )
            self.check_agreement()
        return report

    @torch.no_grad()
    def _on_stepped(self, step: int) -> None:
        """Move the topology of one batch of layers. A collective."""
        names = self._batches[self._next_batch]
        self._next_batch += 1
        if not names:
            return
        old = [self.masks[name] for name in names]
        active = UnitSet([m.bits for m in old], [m.active for m in old], [m.units for m in old])
        fraction, index = self.schedule.drop_fraction(step), self.schedule.update_index(step)
        units = self._units(names, index, scored=True, whole_model=self.whole_model)
        try:
            new = self.method.update(units, active, fraction)
        except ValueError as error:  # on every rank
            raise UserError(
                f"step {step}: {error}; a weight became infinite or NaN in it. Lower optimizer.lr"
            ) from error
        grown = torch.stack([(n - o).count() for n, o in zip(new.parts, active.parts)])
        if self.structure.unstructured:
            grown = self.shards.sum_over_ranks(grown)
        self._install(names, new, old)
        assert self._report is not None
        self._report = UpdateReport(
            self._report.active + sum(new.sizes),
            self._report.dropped + sum(units.share(active, fraction)),
            self._report.replaced + int(grown.sum()),
        )

    def _units(self, names: list[str], index: int, scored: bool, whole_model: bool) -> Units:
        """The units of some layers, with what scores they have on this step."""
        parts: list[LayerPart] = []
        empty = torch.zeros(0, device=self.shards.state_device)
        dense = scored and self.method.growth == "gradient"
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
            scores["magnitude"] = self._block_scores(names, [(p.start, p.master) for p in parts])
        if dense:
            gradients = [(p.start, p.gradient) for p in parts if p.gradient is not None]
            scores["gradient"] = self._block_scores(names, gradients)
        if groups:
            return GroupedBlocks(names, scores, key, groups)
        return BlockUnits(names, scores, key, whole_model)

    def _block_scores(self, names: list[str], parts: list[tuple[int, Tensor]]) -> list[Tensor]:
        return block_scores(
            parts,
            [self.masks[name].shape for name in names],
            self.structure.block,
            self.structure.score,
            self.shards.sum_over_ranks,
            self.shards.max_over_ranks,
            self.shards.state_device,
            common_scale=self.whole_model,
        )

    def _install(self, names: list[str], new: UnitSet, old: list[LayerMask] | None = None) -> None:
        """Make sets of units the masks; zero weights and moments outside, and those of new units.

        `old`: the masks before, in an update: a grown weight starts at zero with zero moments,
        whatever the dense gradient did to it. Without them every unit is as old as the run.
        """
        for i, name in enumerate(names):
            mask = replace(self.masks[name], bits=new.parts[i], active=new.sizes[i])
            self.masks[name] = mask
            fragment = self.shards.fragment(name)
            if fragment is not None:
                kept = mask if old is None else replace(mask, bits=old[i].bits & mask.bits)
                kept.zero_outside_(list(fragment.tensors().values()), fragment.start)
        if self.show_patterns:
            for name, pattern in self.patterns(names):
                self.layers[name].pattern = pattern

    def patterns(self, names: list[str] | None = None) -> Iterator[tuple[str, Pattern]]:
        """The whole pattern of each layer, one after the other, on every rank. A collective."""
        for name in self.layers if names is None else names:
            mask = self.masks[name]
            flags = torch.zeros(mask.units, dtype=torch.uint8, device=self.shards.device)
            flags[mask.start : mask.start + mask.bits.numel] = mask.bits.flags()
            if mask.sharded:
                flags = self.shards.sum_over_ranks(flags)
            yield name, Pattern(flags.view(torch.bool).view(mask.grid), mask.block)

    def counts(self) -> tuple[int, int]:
        """(active weights, all weights) of the sparse layers, over all ranks."""
        active = sum(mask.active * mask.block_size for mask in self.masks.values())
        return active, sum(mask.units * mask.block_size for mask in self.masks.values())

    def digest(self) -> str:
        """A digest of every mask that does not depend on how it is spread. A collective.

        sha256 over sums of the random scores of the active units: sums can be made anywhere.
        """
        sums = torch.zeros(len(self.masks), 2, dtype=torch.int64, device=self.shards.device)
        for row, (name, mask) in zip(sums, self.masks.items()):
            keys = [RandomKey.of(0, i, name) for i in range(2)]
            for start, stop in chunks(mask.bits.numel, mask.bits.data.device):
                flags = mask.bits.flags(start, stop).to(torch.int32).neg_()
                for i, key in enumerate(keys):
                    scores = key.range(mask.start + start, mask.start + stop, flags.device)
                    row[i] += (scores & flags).sum(dtype=torch.int64).to(row.device)
        if self.structure.unstructured:
            sums = self.shards.sum_over_ranks(sums)
        digest = hashlib.sha256()
        for name, row in zip(self.masks, sums.tolist()):
            digest.update(f"{name}:{row[0]:x}:{row[1]:x};".encode())
        return digest.hexdigest()

    def check_agreement(self) -> None:
        """Raise if masks do not have the counts they must, or ranks disagree. A collective.

        Contracts 2 and 3. Where every rank holds whole masks they must be equal.
        """
        if not self.masks:
            return
        whole = self.shards.replicated or not self.structure.unstructured
        if whole and dist.get_world_size() > 1:
            mine = hashlib.sha256()
            for mask in self.masks.values():
                mine.update(mask.bits.data.cpu().numpy().tobytes())
            number = int(mine.hexdigest()[:15], 16)
            low = torch.tensor([number, -number], dtype=torch.int64, device=self.shards.device)
            dist.all_reduce(low, op=dist.ReduceOp.MIN)
            if int(low[0]) != -int(low[1]):
                raise RuntimeError("the ranks' topologies differ: a bug, or a corrupted rank")
        wrong = self._wrong_counts()
        if wrong:
            raise RuntimeError(f"the mask of {wrong[0]} has not its number of active units: a bug")

    def _wrong_counts(self) -> list[str]:
        """Layers whose masks have not the active units they should. A collective."""
        if not self.masks:
            return []
        found = torch.stack([mask.bits.count() for mask in self.masks.values()])
        if self.structure.unstructured:
            found = self.shards.sum_over_ranks(found)
        pairs = zip(self.masks.items(), found.tolist(), strict=True)
        return [name for (name, mask), count in pairs if count != mask.active]


def _matrix(shards: Shards, name: str) -> tuple[int, int]:
    """Shape of a whole weight, `[out, in]`."""
    out_features, in_features = shards.shape(name)
    return out_features, in_features
