"""Where ZeRO keeps each parameter: the only file that knows.

A rank's part of a parameter is a `Fragment`: a contiguous range of the flattened parameter with
1-D views of its fp32 master weight and both Adam moments. Everything that edits weights,
gradients or moments goes through these views, in place and without a gather.

Tested against DeepSpeed 0.19.8 at stages 0-3, fp32 and bf16, with and without CPU offload.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's `[start, start + numel)` of a flattened parameter; all tensors 1-D views."""

    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def numel(self) -> int:
        return self.master.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class Shards(ABC):
    """Access to the fragments of an engine's parameters. One subclass a layout."""

    replicated = False  # whether every rank's fragment is the same whole parameter

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self.engine, self.base_optimizer = engine, optimizer
        module: nn.Module = engine.module
        self.parameters = dict(module.named_parameters())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.parameters[name].shape)

    @abstractmethod
    def fragment(self, name: str) -> Fragment | None:
        """This rank's part, or None where it owns nothing of the parameter."""

    @abstractmethod
    def gradient(self, name: str) -> Tensor | None:
        """A view of this rank's part of the averaged, accumulated gradient, 1-D.

        Valid only between `engine.backward` of the last micro-batch and `engine.step`. In place
        edits are what the optimizer sees.
        """

    @abstractmethod
    def push_masters(self) -> None:
        """Copy edited master weights into the model. A collective at stages 1 to 3."""

    def fragments(self) -> Iterator[tuple[str, Fragment]]:
        """Every (name, fragment) this rank owns something of, in the model's order."""
        for name in self.parameters:
            fragment = self.fragment(name)
            if fragment is not None and fragment.numel:
                yield name, fragment

    @property
    def device(self) -> torch.device:
        """Where ranks exchange."""
        return self.engine.device

    @property
    def state_device(self) -> torch.device:
        """Where masters and moments lie: the host with CPU offload. The same for all of them."""
        return next(iter(self.base_optimizer.state)).device

    def settle(self) -> None:
        """Wait for averaged gradients that are still on their way to the host (CPU offload)."""
        wait = getattr(self.engine.optimizer, "_wait_for_offload_copies", None)
        if wait is not None:
            wait()

    def batches(self) -> list[list[str]]:
        """Names of the parameters of each `optimizer.step` that one `engine.step` makes, in order.

        The same on every rank, whatever it owns of them.
        """
        return [list(self.parameters)]

    def stepped_gradient(self, fragment: Fragment) -> Tensor:
        """The gradient that the optimizer's step has just used, of a fragment in its batch; 1-D.

        Valid only inside `optimizer.step`, behind the arithmetic of Adam.
        """
        found = self.stepped(fragment)
        gradient = None if found is None else found[1].grad
        if found is None or gradient is None:
            raise RuntimeError("a fragment is not in the batch its parameter is in: a bug")
        return gradient.view(-1)[found[2] : found[2] + fragment.numel]

    def stepped(self, fragment: Fragment) -> tuple[dict[str, Any], Tensor, int] | None:
        """The group and tensor by which the optimizer's step moves a fragment, and where in it.

        None where another of the steps of `batches` does. Valid only inside `optimizer.step`.
        """
        first = fragment.master.data_ptr()
        for group in self.base_optimizer.param_groups:
            for flat in group["params"]:
                offset = (first - flat.data_ptr()) // flat.element_size()
                if 0 <= offset < flat.numel() and flat.grad is not None:
                    return group, flat, offset
        return None

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduce of what each rank has of its fragments; every position is counted once."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        if self.replicated or dist.get_world_size() == 1:
            return values
        there = values.to(self.device)  # fragments may lie on the host (CPU offload)
        dist.all_reduce(there, op=operation)
        return there.to(values.device)

    def zero_gradients(self) -> None:
        """Zero this step's gradients, so that a held step leaves no trace."""
        for name in self.parameters:
            gradient = self.gradient(name)
            if gradient is not None:
                gradient.zero_()

    def _state(self, tensor: Tensor, key: str) -> Tensor:
        return self.base_optimizer.state[tensor][key]


class ReplicatedShards(Shards):
    """Stage 0: every rank holds everything; a rank's fragment is the whole parameter."""

    replicated = True

    def fragment(self, name: str) -> Fragment | None:
        p = self.parameters[name]
        return Fragment(0, p.data.view(-1), *(self._state(p, key).view(-1) for key in MOMENTS))

    def gradient(self, name: str) -> Tensor | None:
        grad = self.parameters[name].grad
        return None if grad is None else grad.view(-1)

    def push_masters(self) -> None:
        """Nothing to do: the model's weight is the master."""


class PartitionedOptimizerShards(Shards):
    """Stages 1 and 2: full low-precision weights, partitioned masters, moments, gradients."""

    def fragment(self, name: str) -> Fragment | None:
        mapping = getattr(self.parameters[name], "_hp_mapping", None)
        if mapping is None:
            return None
        if not mapping.optim_fragment:
            self.relink()
        return Fragment(
            mapping.lp_fragment_address.start,
            mapping.hp_fragment.data,
            *(mapping.optim_fragment[key] for key in MOMENTS),
        )

    def relink(self) -> None:
        """Link every group's moments; DeepSpeed links only the first group's by itself."""
        optimizer = self.engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def gradient(self, name: str) -> Tensor | None:
        p: Any = self.parameters[name]
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:
            return None
        gradients = mapping.offload_gradient_dict if mapping.use_offload else mapping.gradient_dict
        group = gradients.get(mapping.param_group_index)
        if group is None:
            return None
        gradient = group[p._index_in_param_group].view(-1)
        address = mapping.lp_fragment_address
        if gradient.numel() == p.numel() != address.numel:
            gradient = gradient.narrow(0, address.start, address.numel)
        return gradient

    def zero_gradients(self) -> None:
        super().zero_gradients()
        # BF16_Optimizer keeps whole gradients on every rank and looks for non-finite values in
        # all of them: what stayed in another rank's part would make the ranks take other paths.
        optimizer = self.engine.optimizer
        for flat in getattr(optimizer, "fp32_groups_gradients_flat", ()):
            flat.zero_()
        # With CPU offload a step that DeepSpeed skips leaves its accumulation buffers (bf16 with
        # fp32 accumulation) as they are: NaN would stay in every later gradient.
        if getattr(optimizer, "cpu_offload", False):
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    def batches(self) -> list[list[str]]:
        groups = getattr(self.engine.optimizer, "bit16_groups", None)
        if groups is None:  # BF16_Optimizer steps everything at once
            return super().batches()
        return _names_of(groups, self.parameters)

    def push_masters(self) -> None:
        self.engine.optimizer.update_lp_params()


class PartitionedParameterShards(Shards):
    """Stage 3: parameters, masters, moments and gradients partitioned evenly, the last padded."""

    def shape(self, name: str) -> tuple[int, ...]:
        p: Any = self.parameters[name]
        return tuple(p.ds_shape)

    def _range(self, name: str) -> tuple[int, int]:
        p: Any = self.parameters[name]
        size = p.ds_tensor.ds_numel
        start = dist.get_rank(p.ds_process_group) * size
        return start, max(0, min(size, p.ds_numel - start))

    def fragment(self, name: str) -> Fragment | None:
        start, numel = self._range(name)
        if numel == 0:
            return None
        optimizer, p = self.engine.optimizer, self.parameters[name]
        parts = [
            optimizer._get_fp32_opt_state_partition(
                p, release_swap_buffers=True, optim_state_key=key
            )[0]
            for key in (None, *MOMENTS)
        ]
        return Fragment(start, *(part.data.view(-1)[:numel] for part in parts))

    def gradient(self, name: str) -> Tensor | None:
        _, numel = self._range(name)
        if numel == 0:
            return None
        gradient, _ = self.engine.optimizer._get_fp32_grad_state_partition(
            self.parameters[name], release_swap_buffers=True
        )
        return gradient.view(-1)[:numel]

    def batches(self) -> list[list[str]]:
        return _names_of(self.engine.optimizer.fp16_groups, self.parameters)

    def push_masters(self) -> None:
        optimizer = self.engine.optimizer
        for name, p in self.parameters.items():
            fragment = self.fragment(name)
            if fragment is not None:
                shard: Any = p
                shard.ds_tensor.data.view(-1)[: fragment.numel].copy_(fragment.master)
        if optimizer.persistent_parameters:
            for p in optimizer.persistent_parameters:
                p.partition()
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _names_of(groups: list[list[Any]], parameters: dict[str, Any]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(parameter)] for parameter in group] for group in groups]


def shards_of(engine: Any, optimizer: torch.optim.Optimizer) -> Shards:
    """The layout of a DeepSpeed engine whose client optimizer is `optimizer`."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return ReplicatedShards(engine, optimizer)
    if stage in (1, 2):
        return PartitionedOptimizerShards(engine, optimizer)
    return PartitionedParameterShards(engine, optimizer)
