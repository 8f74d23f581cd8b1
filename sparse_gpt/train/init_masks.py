"""Finds a first topology that is not random: the one place that makes the gradients for it.

SNIP and FORCE ask the engine, so that they work at any ZeRO stage: the gradient of the averaged
global batch stays where it is sharded, and so do the scores. GraSP differentiates twice, before
the engine shards or hooks anything. Batches are the run's own first ones; they are not consumed.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_gpt.config import RunConfig
from sparse_gpt.data.loader import Batch, BatchStream, PackedDataset, TrainLoader
from sparse_gpt.errors import UserError
from sparse_gpt.topology.init_masks import Choice, choose
from sparse_gpt.topology.init_masks.force import round_counts
from sparse_gpt.topology.init_masks.grasp import gradient_flow
from sparse_gpt.topology.init_masks.lottery import final_magnitude
from sparse_gpt.topology.init_masks.snip import sensitivity
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.shards import Shards
from sparse_gpt.train.build import structure_of
from sparse_gpt.train.checkpoint_files import (
    UNSURE,
    CheckpointReader,
    list_steps,
    open_checkpoint,
    step_folder,
)
from sparse_gpt.train.evaluate import to_device
from sparse_gpt.train.every_rank import on_every_rank
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.hessian_gradient import hessian_gradient


@dataclass(frozen=True)
class FirstTopology:
    """Masks of the sparse layers as one rank holds them: `SavedMasks` for a controller."""

    masks: dict[str, LayerMask]

    @property
    def units(self) -> dict[str, int]:
        """Active units of every layer."""
        return {name: mask.active for name, mask in self.masks.items()}

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """bool `[count]`: the units from `start` on that this rank holds."""
        mask = self.masks[name]
        if (start, count) != (mask.start, mask.bits.numel):
            raise ValueError(f"{name}: this rank does not hold units {start} + {count}")
        return mask.bits.flags().view(torch.bool)


class MaskFinder:
    """Finds the first topology of a run by `sparsity.init_mask`.

    `units`: active units of each sparse layer in a uniform topology; the found one has as many in
    all, so that it costs the same: a sparse product takes 2 S FLOPs for each active weight of any
    layer. Which layer keeps how many comes from the scores.
    """

    def __init__(
        self,
        config: RunConfig,
        units: dict[str, int],
        data: PackedDataset,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.config, self.names, self.total = config, list(units), sum(units.values())
        self.accumulation, self.device = config.accumulation(world_size), device
        self.loader = TrainLoader(
            data, config.micro_batch_size, rank, world_size, self.accumulation
        )
        self.sparsity = config.sparsity
        self._flow: dict[str, Tensor] = {}
        if self.sparsity.init_mask == "grasp" and config.deepspeed.zero_stage == 3:
            raise UserError(
                "sparsity.init_mask: grasp differentiates twice, through weights that "
                "deepspeed.zero_stage 3 gathers and frees in between; start the run at "
                "deepspeed.zero_stage 2 or lower, or set init_mask: force"
            )

    def before_engine(self, model: nn.Module) -> None:
        """What needs whole weights: GraSP's scores, while the model is not sharded yet."""
        if self.sparsity.init_mask != "grasp":
            return
        model.to(self.device)
        weights = [model.get_parameter(name) for name in self.names]
        with _without_dropout(model), torch.no_grad():
            with torch.enable_grad():
                products = hessian_gradient(model, weights, self._micro_batches)
            for name, weight, product in zip(self.names, weights, products):
                self._flow[name] = gradient_flow(weight, product).view(-1).cpu()

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        with closing(self.loader.batches(0)) as batches:
            for _ in range(self.sparsity.scoring.batches * self.accumulation):
                yield to_device(next(batches), self.device)

    @torch.no_grad()
    def find(self, engine: Any, optimizer: Any, shards: Shards) -> FirstTopology:
        """The first topology; weights, moments and step counts stay as they are. A collective."""
        self.engine, self.optimizer, self.shards = engine, optimizer, shards
        rows: list[tuple[int, ...]] = [shards.shape(name) for name in self.names]
        self.choice = Choice(
            self.names,
            [(out, inner) for out, inner in rows],
            structure_of(self.config),
            shards.sum_over_ranks,
            shards.max_over_ranks,
            shards.state_device,
        )
        kind = self.sparsity.init_mask
        if kind == "lottery":
            return self._chosen(self._lottery(), self.total)
        if kind == "grasp":
            flow = {name: self._part(name, self._flow.pop(name)) for name in self.names}
            return self._chosen(flow, self.total, signed=True)
        engine.train()
        with closing(self.loader.batches(0)) as batches, _without_dropout(engine.module):
            if kind == "snip":
                return self._chosen(self._sensitivity(batches, self._weights()), self.total)
            return self._force(batches)

    def _force(self, batches: BatchStream) -> FirstTopology:
        """FORCE's rounds. The forward pass is masked by masters that are 0, so no rank needs a
        whole mask, and the gradient is by every weight; the weights come back at the end."""
        dense = {name: weight.clone() for name, weight in self._weights().items()}
        total = sum(self.choice.totals)
        for count in round_counts(total, self.total, self.sparsity.scoring.rounds):
            found = self._chosen(self._sensitivity(batches, dense), count)
            for name, weight in self._weights().items():
                weight.copy_(dense[name])
                if count > self.total:
                    start = self._start(name)
                    found.masks[name].zero_outside_(weight, start)
            self.shards.push_masters()
        return found

    def _start(self, name: str) -> int:
        fragment = self.shards.fragment(name)
        return 0 if fragment is None else fragment.start

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a flattened weight's values."""
        fragment = self.shards.fragment(name)
        size = 0 if fragment is None else fragment.numel
        start = self._start(name)
        return whole[start : start + size].to(self.shards.state_device)

    def _weights(self) -> dict[str, Tensor]:
        """This rank's part of every sparse layer's fp32 weight, 1-D views."""
        nothing = torch.zeros(0, device=self.shards.state_device)
        fragments = {name: self.shards.fragment(name) for name in self.names}
        return {name: nothing if f is None else f.master for name, f in fragments.items()}

    def _sensitivity(self, batches: BatchStream, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """|w * dL/dw| of this rank's part of every layer, of the next `scoring.batches` batches."""
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for _ in range(self.sparsity.scoring.batches):
            with torch.enable_grad():
                self._backward(batches)
            self.shards.settle()
            for name, total in gradients.items():
                part = self.shards.gradient(name)
                if total.numel() and part is not None:
                    total += part.to(total)
            self.shards.zero_gradients()
            self.optimizer.hold = True
            self.engine.step()
            self.optimizer.hold = False
        return {name: sensitivity(weights[name], gradients[name]) for name in self.names}

    def _backward(self, batches: Iterator[Batch]) -> None:
        """Gradients of one global batch, up to the boundary."""
        for micro_step in range(self.accumulation):
            self.engine.backward(self.engine(**to_device(next(batches), self.device)))
            if micro_step < self.accumulation - 1:
                self.engine.step()

    def _lottery(self) -> dict[str, Tensor]:
        """|w| of this rank's part of every layer at the end of another run."""
        lottery, found = self.sparsity.lottery, {}
        assert lottery is not None

        def read() -> None:
            reader = open_checkpoint(lottery.final, verify=False)
            kinds = ("master-", "topology-", "slots-")
            needed = [f for f in reader.files if f.startswith(kinds)]
            reader.verify(needed)
            for name in self.names:
                shape = self.shards.shape(name)
                there = reader.dense_shape(name) if name in reader.shapes else None
                if there != shape:
                    raise UserError(
                        f"{reader.path} is of another model: {name} is {shape} here, {there} there"
                    )
                final = reader.parameter(name).view(-1)  # one layer whole at a time
                found[name] = final_magnitude(self._part(name, final).clone())

        on_every_rank(read, "sparsity.lottery.final")
        return found

    def _chosen(self, scores: dict[str, Tensor], total: int, signed: bool = False) -> FirstTopology:
        parts = [(self._start(name), scores[name]) for name in self.names]
        finite = torch.stack([torch.isfinite(score).all() for _, score in parts]).all()
        if self.shards.sum_over_ranks((~finite).int()):
            raise UserError(
                f"sparsity.init_mask: {self.sparsity.init_mask}: scores are not finite: the first "
                "batches, or the weights, make the loss or its gradient infinite or NaN"
            )
        chosen = choose(self.choice, parts, total, signed)
        block = self.choice.structure.block
        masks = {}
        for i, (name, shape) in enumerate(zip(self.names, self.choice.shapes)):
            start = parts[i][0] if self.choice.structure.unstructured else 0
            masks[name] = LayerMask(shape, block, chosen.parts[i], start, chosen.sizes[i])
        return FirstTopology(masks)


def saved_counts(folder: Path, units: dict[str, int]) -> dict[str, int] | None:
    """Each layer's first number of units by the newest checkpoint of a run; None without one.

    A run that goes on takes its topology from there. Layers that the checkpoint has not keep
    their number in `units`: loading it says what differs. A collective.
    """

    def read() -> dict[str, int] | None:
        tags = ("step", UNSURE)
        found = [(step, tag) for tag in tags for step in list_steps(folder, tag)]
        if not found:
            return None
        saved = CheckpointReader(folder / step_folder(*max(found))).manifest["layers"]
        return {name: saved.get(name, {}).get("target") or n for name, n in units.items()}

    return on_first_rank(read, f"checkpoint folder {folder}")


class RewoundWeights:
    """A checkpoint as a source of weights alone: its masks do not come along."""

    def __init__(self, path: Path) -> None:
        reader = open_checkpoint(path)
        reader.check_model()
        self.gpt_config, self.identity = reader.gpt_config, reader.identity
        self.tokenizer_sha256, self.parameter = reader.tokenizer_sha256, reader.parameter
        self.layers: dict[str, Any] = {}

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """There is none; raises `KeyError`."""
        raise KeyError(name)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout inside: its generators differ from rank to rank.

    The model itself stays in training mode, on which activation checkpointing depends.
    """
    model.train()
    for child in model.children():
        child.eval()
    try:
        yield
    finally:
        model.train()
