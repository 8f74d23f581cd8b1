"""Keeps the topology of a model, and moves it around the optimizer step in two phases.

    begin_step    ask for dense gradients, if this step grows by gradient
    before_step   read growth scores from the averaged gradient, zero the gradient outside B
    (engine.step: clip, Adam)
    after_step    if the step was applied: drop, grow, clean weights and moments

For static, SET and RigL the forward set A, the trained set B and the stored set C are the same.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import Pattern
from sparse_gpt.topology.methods import Method
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure


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


class TopologyController:
    """The topology of every sparse layer of a model, over whatever shards it lives in.

    `layers`: sparse layers by the name of their weight, each with its pattern set. `hold_step`:
    whether an update replaces the optimizer step (RigL as published) or follows it.
    """

    def __init__(
        self,
        layers: dict[str, SparseLinear],
        structure: BlockStructure,
        method: Method,
        schedule: UpdateSchedule,
        seed: int,
        shards: Shards,
        hold_step: bool = False,
    ) -> None:
        self.layers, self.structure, self.method = layers, structure, method
        self.schedule, self.seed, self.shards = schedule, seed, shards
        self.replaces_step = hold_step
        self._growth: dict[str, Tensor | None] = {}

    def is_update(self, step: int) -> bool:
        """Whether the topology changes at step t (from 1)."""
        return self.method.dynamic and bool(self.layers) and self.schedule.is_update(step)

    def begin_step(self, step: int) -> None:
        """Before the first micro-batch of step t: choose active or dense weight gradients."""
        dense = self.is_update(step) and self.method.growth == "gradient"
        for layer in self.layers.values():
            layer.dense_grad = dense

    def holds_step(self, step: int) -> bool:
        """Whether the optimizer step of step t is replaced by a topology update."""
        return self.replaces_step and self.is_update(step)

    def before_step(self, step: int) -> Tensor:
        """At the accumulation boundary: keep growth scores, zero the gradient outside B.

        Returns a 0-d bool tensor: whether this rank's growth gradients are finite.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.shards.engine.device)
        self._growth = {}
        if not (self.is_update(step) and self.method.growth == "gradient"):
            return finite
        for name, layer in self.layers.items():
            gradient = self.shards.gradient(name)
            if gradient is None:
                self._growth[name] = None
                continue
            self._growth[name] = gradient.float().clone()
            finite &= torch.isfinite(gradient).all().to(finite.device)
            gradient.masked_fill_(self._outside(name, layer, gradient.device), 0)
        return finite

    @torch.no_grad()
    def after_step(self, step: int, applied: bool) -> UpdateReport | None:
        """Move the topology, if step t is an update and was applied. A collective."""
        growth, self._growth = self._growth, {}
        if not (applied and self.is_update(step)):
            return None
        fraction, index = self.schedule.drop_fraction(step), self.schedule.update_index(step)
        active = dropped = replaced = 0
        for name, layer in self.layers.items():
            assert layer.pattern is not None
            old = layer.pattern.active
            count = int(fraction * int(old.sum()))
            new = self.method.update(
                old, self._magnitude(name), self._growth_scores(name, index, growth), count
            )
            self._set(name, layer, Pattern(new, layer.pattern.block))
            active += int(new.sum())
            dropped += count
            replaced += int((new & ~old).sum())
        self.check_agreement()
        return UpdateReport(active, dropped, replaced)

    def _magnitude(self, name: str) -> Tensor:
        fragment = self.shards.fragment(name)
        weight = self.shards.assemble(name, None if fragment is None else fragment.master)
        return self.structure.scores(weight)

    def _growth_scores(self, name: str, index: int, growth: dict[str, Tensor | None]) -> Tensor:
        rows, cols = self.structure.grid(self._matrix(name))
        if self.method.growth == "gradient":
            return self.structure.scores(self.shards.assemble(name, growth.pop(name)))
        device = self.shards.engine.device
        return random_scores(self.seed, index, name, 0, rows * cols, device).view(rows, cols)

    def _matrix(self, name: str) -> tuple[int, int]:
        out_features, in_features = self.shards.shape(name)
        return out_features, in_features

    def _outside(self, name: str, layer: SparseLinear, device: torch.device) -> Tensor:
        """Bool over this rank's fragment: True outside the trained set."""
        fragment = self.shards.fragment(name)
        assert fragment is not None and layer.pattern is not None
        mask = layer.pattern.expand().reshape(-1)
        return ~mask[fragment.start : fragment.start + fragment.numel].to(device)

    def _set(self, name: str, layer: SparseLinear, pattern: Pattern) -> None:
        """Make `pattern` the topology of a layer; everything outside it becomes exactly zero."""
        layer.pattern = pattern
        fragment = self.shards.fragment(name)
        if fragment is not None:
            outside = self._outside(name, layer, fragment.master.device)
            for tensor in fragment.tensors().values():
                tensor.masked_fill_(outside, 0)
        self.shards.apply_pattern(name, pattern)

    def patterns(self) -> dict[str, Pattern]:
        """The topology, by the name of the weight."""
        return {name: layer.pattern for name, layer in self.layers.items() if layer.pattern}

    def load_patterns(self, patterns: dict[str, Pattern]) -> None:
        """Replace the topology by a saved one; weights are not touched."""
        for name, layer in self.layers.items():
            layer.pattern = patterns[name].to(self.shards.engine.device)

    def counts(self) -> tuple[int, int]:
        """(active weights, all weights) of the sparse layers, counted from the masks."""
        active = total = 0
        for pattern in self.patterns().values():
            active += int(pattern.active.sum()) * pattern.block[0] * pattern.block[1]
            total += pattern.shape[0] * pattern.shape[1]
        return active, total

    def digest(self) -> str:
        """sha256 over every mask, in the model's order."""
        digest = hashlib.sha256()
        for name, pattern in self.patterns().items():
            digest.update(name.encode())
            digest.update(pattern.active.cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_agreement(self) -> None:
        """Raise if ranks disagree about the topology (Contract 3). A collective."""
        if dist.get_world_size() == 1:
            return
        mine = int(self.digest()[:15], 16)
        device = self.shards.engine.device
        low = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        if int(low[0]) != -int(low[1]):
            raise RuntimeError("the ranks' topologies differ: a bug, or a corrupted rank")
