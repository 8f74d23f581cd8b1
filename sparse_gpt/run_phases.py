"""What the steps of a run cost in its sparse layers, before it starts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from sparse_gpt.config import RunConfig
from sparse_gpt.model.run_flops import Phase
from sparse_gpt.run_method import method_of
from sparse_gpt.run_scoring import scoring_phases
from sparse_gpt.topology.methods import Method


def topology_updates(config: RunConfig, world_size: int) -> int:
    """Steps of the run in which the topology changes."""
    method = method_of(config, world_size)
    return sum(map(method.is_update, range(1, config.total_steps(world_size) + 1)))


def phases(config: RunConfig, units: Iterable[tuple[int, int]], world_size: int) -> list[Phase]:
    """Consecutive steps of a run that cost the same, if all of them are finite.

    First those that score a topology before step 1.

    `units`: (kept, all) weights or blocks of every layer that can be sparse; one that keeps all
    is dense.
    """
    size, pairs = config.block_size, list(units)
    dense = sum(every for kept, every in pairs if kept == every)
    layers = [(kept, every) for kept, every in pairs if kept < every]
    method, steps = method_of(config, world_size), config.total_steps(world_size)
    return [
        *scoring_phases(config, pairs),
        *(
            Phase(many, size * (dense + active), size * (dense + gradient))
            for many, active, gradient in unit_phases(method, layers, steps)
        ),
    ]


def unit_phases(
    method: Method, layers: Sequence[tuple[int, int]], steps: int
) -> list[tuple[int, int, int]]:
    """(steps, units in forward and dX, units in dW) of consecutive steps that cost the same.

    `layers`: (final, all) units of each sparse layer. Exactly what a run counts whose steps are
    all finite.
    """
    everything = sum(every for _, every in layers)
    alike = Counter(layers)  # a model has a few kinds of layers
    found = []
    for stretch in stretches(method, steps):
        last = stretch.first - 1
        active = sum(n * method.active_after(last, *pair) for pair, n in alike.items())
        gradient = sum(n * method.trained_after(last, *pair) for pair, n in alike.items())
        found.append((stretch.steps, active, everything if stretch.in_full else gradient))
    return found


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps with the same topology; `in_full`: whether they make dense gradients."""

    first: int
    steps: int
    in_full: bool


@lru_cache(maxsize=8)  # searches ask for the same one again and again
def stretches(method: Method, steps: int) -> tuple[Stretch, ...]:
    """The stretches of a run of `steps`, in order."""
    found: list[Stretch] = []
    for step in range(1, steps + 1):
        moved = method.is_update(step - 1) or method.trains(step) != method.trains(step - 1)
        in_full = method.needs_dense_gradient(step)
        if found and not moved and found[-1].in_full == in_full:
            found[-1] = replace(found[-1], steps=found[-1].steps + 1)
        else:
            found.append(Stretch(step, 1, in_full))
    return tuple(found)
