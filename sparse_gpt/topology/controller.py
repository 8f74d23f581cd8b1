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

Where a method's three sets differ (`methods/base.py`), `masks` are the forward set A and `trained`
the trained set B; weights outside A keep their values if it stores all, and layers then get A as
their pattern.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import BlockLayout, Pattern
from sparse_gpt.topology import agreement
from sparse_gpt.topology.bits import Bits, chunks
from sparse_gpt.topology.ever_active import EverActive
from sparse_gpt.topology.interfaces import SavedMasks, Together, UnitSource, UpdateReport, call
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.methods import Method, Sets
from sparse_gpt.topology.scorer import Scorer
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import UnitSet

log = logging.getLogger(__name__)


class TopologyController:
    """The topology of every sparse layer of a model, over whatever shards it lives in.

    `layers`: sparse layers by the name of their weight. `units`: active units of each when the
    method is done. The first topology is the method's, or `saved`. Masters are masked;
    `Shards.push_masters` is left to the caller. `whole_model`: updates compare units across
    layers. `global_start`: the first active units are the largest of the whole model, and every
    layer's number is what falls to it. `hold_step`: whether an update replaces the optimizer step
    (RigL as published) or follows it. `show_patterns`: whether the layers' kernels need to see the
    pattern; a dense product over zeros does not. `together`: runs an action on every rank, and
    raises everywhere what it raised on one.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        units: dict[str, int],
        structure: BlockStructure,
        method: Method,
        seed: int,
        shards: Shards,
        saved: SavedMasks | None = None,
        whole_model: bool = False,
        global_start: bool = False,
        hold_step: bool = False,
        show_patterns: bool = False,
        together: Together = call,
    ) -> None:
        self.layers, self.structure, self.method = layers, structure, method
        self.targets, self.seed, self.shards = units, seed, shards
        self.whole_model, self.replaces_step = whole_model, hold_step
        self.show_patterns = show_patterns or method.stores_all
        self.masks: dict[str, LayerMask] = {}
        self.ever = EverActive()
        self._scorer = self._make_scorer()
        self.trained: dict[str, LayerMask] = {}  # B, where it is neither A nor everything
        self._batches = [[n for n in batch if n in layers] for batch in shards.batches()]
        if whole_model and sum(map(bool, self._batches)) > 1:
            raise RuntimeError("the layers of one selection are in several optimizer steps: a bug")
        # Called by an update with a layer's name, the units that are new in it, and its mask.
        self.on_grown: Callable[[str, Bits, LayerMask], None] | None = None
        self._next_batch = 0
        self._report: UpdateReport | None = None
        self._dense_gradients = False
        if saved is None:
            self._draw(global_start)
        else:
            read: dict[str, Bits] = {}
            together(lambda: read.update(self.read(saved)))
            self.load(read, units)

    @property
    def layouts(self) -> dict[str, BlockLayout]:
        """Where the blocks of compactly stored layers lie, by name; empty with masked storage."""
        return {}

    def set_slots(self, name: str, slots: Tensor) -> None:
        """The order of a compactly stored layer, as a checkpoint has it."""
        raise TypeError(f"{name} is not in compact storage")

    def _make_scorer(self) -> UnitSource:
        by_gradient = self.method.growth == "gradient"
        return Scorer(self.targets, self.structure, self.shards, self.seed, by_gradient)

    def _spread(self, units: UnitSet) -> UnitSet:
        """Units as masks hold them -> as the scorer's units are spread over ranks."""
        return units

    def _join(self, units: UnitSet) -> UnitSet:
        """The way back. A collective."""
        return units

    def _draw(self, global_start: bool) -> None:
        """The first topology, from (seed, layer name), or from the first weights."""
        names = list(self.layers)
        self.masks = {name: self._empty_mask(name) for name in names}
        if not names:
            return
        # Random units are drawn a layer at a time: nothing compares layers yet.
        compares = self.method.stores_all or global_start
        units = self._scorer.units(
            names, 0, compares, compares and (self.whole_model or global_start)
        )
        empty = [self.masks[name] for name in names]
        nothing = UnitSet([m.bits for m in empty], [0] * len(names), [m.units for m in empty])
        counts = [
            self.method.active_after(0, self.targets[name], mask.units)
            for name, mask in self.masks.items()
        ]
        final = sum(counts) == sum(self.targets.values())
        if not global_start or self.method.stores_all:
            sets = self.method.start(units, ~nothing, counts)
        else:
            sets = Sets(units.best("largest magnitude", ~nothing, [sum(counts)]))
        if global_start:
            sizes = dict(zip(names, sets.forward.sizes, strict=True))
            _check_none_is_empty(sizes)
            self.targets = sizes if final and not self.whole_model else self.targets
        self._install(names, sets)
        self.ever.add(names, self.masks)

    def read(self, saved: SavedMasks, trained: bool = False) -> dict[str, Bits]:
        """What this rank holds of saved masks, A or B. Changes nothing; no collective."""
        read = {}
        for name in self.layers:
            mask = self._empty_mask(name)
            flags = saved.mask(name, mask.start, mask.bits.numel, trained)
            read[name] = Bits.of(flags).to(self.shards.state_device)
        return read

    @property
    def keeps_trained(self) -> bool:
        """Whether B is a set of its own, which is saved and loaded beside A."""
        return bool(self.layers) and self.method.trains(1) == "more"

    def load(
        self,
        read: dict[str, Bits],
        counts: dict[str, int],
        trained: tuple[dict[str, Bits], dict[str, int]] | None = None,
    ) -> None:
        """Replace the topology by one that was read, with its number of active units.

        `trained`: the same for B, where the method has one of its own; without it every weight
        is trained until the next update. Zeroes masters and moments outside what is stored. A
        collective; every rank raises `UserError` where a mask has another number.
        """
        names = list(self.layers)
        self.masks = {name: self._empty_mask(name) for name in names}
        self.ever = EverActive()
        totals = [self.masks[name].units for name in names]

        def units(read: dict[str, Bits], counts: dict[str, int]) -> UnitSet:
            return UnitSet([read[name] for name in names], [counts[n] for n in names], totals)

        backward = None
        if self.keeps_trained:
            nothing = UnitSet([m.bits for m in self.masks.values()], [0] * len(names), totals)
            backward = ~nothing if trained is None else units(*trained)
        forward = units(read, counts)
        self._install(names, Sets(forward, backward))
        self.ever.add(names, self.masks)
        wrong = agreement.wrong_counts(self._all_masks(), self.shards)
        if wrong:
            raise UserError(f"the saved mask of {wrong[0]}")
        unscored = self._scorer.units(names, 0, scored=False, whole_model=False)
        misfits = unscored.misfits(self._spread(forward))
        if misfits:
            raise UserError(
                f"the saved mask of {misfits[0]} has not the same number in every group; keep "
                "sparsity.structure as it was"
            )
        self.check_agreement()

    def zero_outside(self) -> None:
        """Zero masters and moments outside what the method stores."""
        if self.method.stores_all:
            return
        for name, mask in self.masks.items():
            fragment = self.shards.fragment(name)
            if fragment is not None:
                mask.zero_outside_(list(fragment.tensors().values()), fragment.start)

    def _empty_mask(self, name: str) -> LayerMask:
        shape, fragment = self._scorer.shapes[name], self.shards.fragment(name)
        rows, columns = self.structure.grid(shape)
        start, numel = 0, rows * columns
        if self.structure.unstructured:
            start = 0 if fragment is None else fragment.start
            numel = 0 if fragment is None else fragment.numel
        bits = Bits.empty(numel, self.shards.state_device)
        return LayerMask(shape, self.structure.block, bits, start, 0)

    def is_update(self, step: int) -> bool:
        """Whether the topology changes at step t (from 1): as planned, or because a step that
        should have brought a method to its count was not finite."""
        return bool(self.layers) and (self.method.is_update(step) or self._is_behind(step))

    def _is_behind(self, step: int) -> bool:
        if not self.method.makes_up(step):
            return False
        missing = [
            mask.active - self.method.active_after(step - 1, self.targets[name], mask.units)
            for name, mask in self.masks.items()
        ]
        return sum(missing) != 0 if self.whole_model else any(missing)

    def grows_by_gradient(self, step: int) -> bool:
        """Whether step t needs dense weight gradients to grow by."""
        return self.method.growth == "gradient" and self.is_update(step)

    def step_weights(self, step: int) -> tuple[int, int]:
        """Weights of sparse layers in step t: active ones, and those whose gradient it makes."""
        active, everything = self.counts()
        if self.grows_by_gradient(step) or self.method.trains(step) == "all":
            return active, everything
        if self.trained:
            return active, sum(mask.active * mask.block_size for mask in self.trained.values())
        return active, active

    def holds_step(self, step: int) -> bool:
        """Whether the optimizer step of step t is replaced by a topology update."""
        return self.replaces_step and self.is_update(step)

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of step t: choose active or dense weight gradients."""
        dense = self.grows_by_gradient(step) or self.method.trains(step) != "forward"
        for layer in self.layers.values():
            layer.dense_grad = dense

    def before_step(self, step: int) -> Tensor:
        """At the accumulation boundary: zero the gradient outside B, unless weights grow by it.

        Returns a 0-d bool tensor: whether this rank's gradients of sparse layers were finite, in
        B and outside.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.shards.device)
        self.shards.settle()
        self._dense_gradients = self.grows_by_gradient(step)
        everything = self._dense_gradients or self.method.trains(step) == "all"
        for name, fragment, gradient in self._gradients():
            finite &= torch.isfinite(torch.linalg.vector_norm(gradient.float())).to(finite.device)
            if not everything:
                trained = self.trained.get(name, self.masks[name])
                trained.zero_outside_(gradient, fragment.start)
                self._regularise(name, fragment, gradient)
        return finite

    def _regularise(self, name: str, fragment: Any, gradient: Tensor) -> None:
        """Add the gradient of the method's L2 term: strength on A, strength / D on B beyond.

        D: the density of A in what updates compare, the layer or the whole model.
        """
        strength = self.method.regularisation()
        if strength == 0.0:
            return
        forward, backward = self.masks[name], self.trained.get(name, self.masks[name])
        forward, backward = forward.on(gradient.device), backward.on(gradient.device)
        density = forward.active / forward.units
        if self.whole_model:
            masks = self.masks.values()
            density = sum(mask.active for mask in masks) / sum(mask.units for mask in masks)
        for start, stop in chunks(gradient.numel(), gradient.device):
            at = (fragment.start + start, fragment.start + stop)
            inside = forward.flags(*at).float()
            factor = strength * inside + strength / density * (backward.flags(*at) - inside)
            master = fragment.master[start:stop].to(gradient.device)
            gradient[start:stop].add_((factor * master).to(gradient.dtype))

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
        """Before `engine.step` of step t: let the topology move in it, if t is finite and due."""
        self._report, self._next_batch = None, 0
        update = finite and self.is_update(step)
        if update:
            self._report = UpdateReport(0, 0, 0)
        factor = self.method.outside_factor(step) if finite and self.layers else None
        if update or factor is not None:
            optimizer.on_stepped = lambda: self._on_stepped(step, update, factor)

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
    def _on_stepped(self, step: int, update: bool = True, factor: float | None = None) -> None:
        """Move the topology of one batch of layers, and what is outside it. A collective."""
        names = self._batches[self._next_batch]
        self._next_batch += 1
        for name in names if factor is not None else ():
            fragment = self.shards.fragment(name)
            if fragment is not None:
                self.masks[name].scale_outside_(fragment.master, fragment.start, factor or 0.0)
                if self.method.is_fixed(step):
                    moments = [fragment.exp_avg, fragment.exp_avg_sq]
                    self.masks[name].zero_outside_(moments, fragment.start)
        if names and update:
            self._update(names, step)

    def _update(self, names: list[str], step: int) -> None:
        old = [self.masks[name] for name in names]
        active = UnitSet([m.bits for m in old], [m.active for m in old], [m.units for m in old])
        index, targets = self.method.update_index(step), [self.targets[name] for name in names]
        units = self._scorer.units(names, index, scored=True, whole_model=self.whole_model)
        try:
            new = self.method.update(units, Sets(self._spread(active)), targets, step)
        except NonFiniteScores as error:  # on every rank
            raise UserError(
                f"step {step}: {error}; a weight became infinite or NaN in it. Lower optimizer.lr"
            ) from error
        now = self._join(new.sets.forward)
        grown = torch.stack([(n - o).count() for n, o in zip(now.parts, active.parts)])
        if any(mask.sharded for mask in old):
            grown = self.shards.sum_over_ranks(grown)
        emptied = [
            n for n, m, size in zip(names, old, now.sizes, strict=True) if m.active > size == 0
        ]
        if emptied:
            log.warning(
                "step %d: %d layers have no active weight any more (%s, ...): all of theirs are "
                "smaller than other layers'; sparsity.update.scope: layer keeps some in each",
                step,
                len(emptied),
                emptied[0],
            )
        sets = Sets(now, new.sets.trained)
        self._install(names, sets, old, self.method.resets_moments(step))
        self.ever.add(names, self.masks)
        if self.on_grown is not None:
            for i, name in enumerate(names):
                self.on_grown(name, now.parts[i] - active.parts[i], self.masks[name])
        assert self._report is not None
        self._report = UpdateReport(
            self._report.active + sum(now.sizes),
            self._report.dropped + new.dropped,
            self._report.replaced + int(grown.sum()),
        )

    def _install(
        self,
        names: list[str],
        new: Sets,
        old: list[LayerMask] | None = None,
        reset_moments: bool = False,
    ) -> None:
        """Make sets of units the masks, and zero what they leave out.

        Where A is what is stored: weights and moments outside it, and those of new units.
        `old`: the masks before, in an update: a grown weight starts at zero with zero moments,
        whatever the dense gradient did to it. Without them every unit is as old as the run.
        Where all is stored: moments outside B, so that nothing moves there.
        """
        for i, name in enumerate(names):
            mask = self._with(self.masks[name], new.forward, i)
            self.masks[name] = mask
            if new.trained is not None:
                self.trained[name] = self._with(mask, new.trained, i)
            fragment = self.shards.fragment(name)
            if fragment is None:
                continue
            moments = [fragment.exp_avg, fragment.exp_avg_sq]
            if not self.method.stores_all:
                kept = mask if old is None else replace(mask, bits=old[i].bits & mask.bits)
                kept.zero_outside_([fragment.master, *moments], fragment.start)
            elif name in self.trained:
                self.trained[name].zero_outside_(moments, fragment.start)
            if reset_moments:
                for moment in moments:
                    moment.zero_()
        if self.show_patterns:
            for name, pattern in self.patterns(names):
                self.layers[name].pattern = pattern

    @staticmethod
    def _with(mask: LayerMask, units: UnitSet, i: int) -> LayerMask:
        return replace(mask, bits=units.parts[i], active=units.sizes[i])

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

    def _all_masks(self) -> list[tuple[str, LayerMask]]:
        """Every A by the layer's name, then every B that is a set of its own."""
        return [*self.masks.items(), *((f"{n} (trained)", m) for n, m in self.trained.items())]

    def digest(self) -> str:
        """A digest of every mask that does not depend on how it is spread. A collective."""
        return agreement.digest(self._all_masks(), self.shards)

    def check_agreement(self) -> None:
        """Raise if masks do not have the counts they must, or ranks disagree. A collective."""
        agreement.check(self._all_masks(), self.shards)


def _check_none_is_empty(sizes: dict[str, int]) -> None:
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise UserError(
            f"sparsity.distribution: global leaves {len(empty)} layers without an active weight "
            f"({empty[0]}, ...): all their first weights are smaller than others'. Residual "
            "layers are drawn sqrt(2 n_layer) times smaller: start from trained weights "
            "(init_from), prune while training (algorithm gmp, granet, ac_dc), or set another "
            "distribution"
        )
