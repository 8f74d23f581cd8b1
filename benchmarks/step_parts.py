"""Where a training step's time goes, by part of the model, from one profiled step."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sparse_gpt.model.gpt import GPT, MLP, Attention
from sparse_gpt.model.linear import SparseLinear

PREFIX = "part:"
BACKWARD = "autograd::engine::evaluate_function"
# Modules of each part; the innermost counts. fc1's activation is in `linears`, where kernels
# fuse it.
MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "linears": (SparseLinear, MLP),
    "attention": (Attention,),
    "norms": (nn.LayerNorm,),
    "embedding": (nn.Embedding,),
}
PARTS = (*MODULES, "head", "optimizer", "topology", "rest")


class Parts:
    """Attributes the time between `start` and `stop`, of forward, backward and what follows.

    `head` is what a `GPT` does behind its last LayerNorm: logits and loss. Calls of `methods`
    (object, name) count as `topology`. Backward passes count as their forward operations do.
    `rest`: residual sums, what the engine does with gradients, data, and everything else.
    """

    def __init__(self, model: nn.Module, methods: Iterable[tuple[Any, str]] = ()) -> None:
        self.model, self.methods = model, list(methods)

    def start(self) -> None:
        self.undo = ExitStack()
        for module in self.model.modules():
            for part, kinds in MODULES.items():
                if isinstance(module, kinds):
                    self._around(module, module, part)
                    break
            if isinstance(module, SparseLinear) and module.layout is not None:
                self._kernel(module)
        if isinstance(self.model, GPT):
            self._around(self.model.ln_f, self.model, "head", begin_behind=True)
        for owner, name in self.methods:
            self._method(owner, name)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, acc_events=True)
        self.profiler.__enter__()

    def stop(self, seconds: float) -> dict[str, float]:
        """Seconds of each part; `rest` is what is left of `seconds`, the time of the step."""
        self.profiler.__exit__(None, None, None)
        self.undo.close()
        found = attribute(self.profiler.events() or [])
        parts = {part: found.get(part, 0.0) for part in PARTS}
        parts["rest"] = seconds - sum(found.get(part, 0.0) for part in PARTS[:-1])
        return parts

    def _around(
        self, first: nn.Module, last: nn.Module, part: str, begin_behind: bool = False
    ) -> None:
        """A range from before (or behind) `first` until behind `last`."""
        opened: list[record_function] = []

        def begin(*_: Any) -> None:
            opened.append(record_function(PREFIX + part))
            opened[-1].__enter__()

        def end(*_: Any) -> None:
            if opened:
                opened.pop().__exit__(None, None, None)

        if begin_behind:
            handles = [first.register_forward_hook(begin), last.register_forward_hook(end)]
        else:
            handles = [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
        for handle in handles:
            self.undo.callback(handle.remove)

    def _kernel(self, layer: SparseLinear) -> None:
        """Layers of one input are computed in one call of their kernel, not each as a module."""
        kernel = layer.compact_kernel
        layer.compact_kernel = _Ranged(kernel)
        self.undo.callback(setattr, layer, "compact_kernel", kernel)

    def _method(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(PREFIX + "topology"):
                return inner(*args, **kwargs)

        setattr(owner, name, call)
        self.undo.callback(delattr, owner, name)


class _Ranged:
    """A kernel in a range; equal for equal kernels, as layers of one call must have the same."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel = kernel

    def __call__(self, *args: Any) -> Any:
        with record_function(PREFIX + "linears"):
            return self.kernel(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ranged) and other.kernel == self.kernel

    def __hash__(self) -> int:
        return hash(self.kernel)


def attribute(events: Sequence[Any]) -> dict[str, float]:
    """Seconds of each part in a profile; what belongs to none is left out.

    Every event's own time counts for the innermost range around it. In backward that is the
    range of the forward operation that has the same sequence number: of several the last, which
    made the graph's node.
    """
    forward: dict[int, str | None] = {}

    def part_of(event: Any) -> tuple[str | None, bool]:
        """The part, and whether it is of a backward pass."""
        while event is not None:
            if event.name.startswith(PREFIX):
                return event.name.removeprefix(PREFIX), False
            if event.name.startswith("Optimizer.step#"):
                return "optimizer", False
            if event.name.startswith(BACKWARD):
                return forward.get(event.sequence_nr), True
            event = event.cpu_parent
        return None, False

    events = sorted(events, key=lambda event: event.time_range.start)
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(PREFIX):
            part, backward = part_of(event)
            if not backward:
                forward[event.sequence_nr] = part
    on_gpu = torch.cuda.is_available()
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        part, _ = part_of(event)
        if part is not None:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[part] += own * 1e-6
    return dict(seconds)
