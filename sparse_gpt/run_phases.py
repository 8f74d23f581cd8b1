"""What the steps of a run cost in its sparse layers, before it starts."""

from collections import Counter
from collections.abc import Iterable
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
    method, size, pairs = method_of(config, world_size), config.block_size, list(units)
    dense = sum(every for kept, every in pairs if kept == every)
    layers = [(kept, every) for kept, every in pairs if kept < every]
    alike = Counter(layers)  # a model has a few kinds of layers
    model = alike
    if config.sparsity.update.scope == "model":
        model = Counter([(sum(kept for kept, _ in layers), sum(every for _, every in layers))])
    found = scoring_phases(config, pairs)
    for stretch in stretches(method, config.total_steps(world_size)):
        # The first topology is made a layer at a time.
        of, last = (model if stretch.moved else alike), stretch.first - 1
        active = sum(n * method.active_after(last, *pair) for pair, n in of.items())
        gradient = sum(n * method.trained_after(last, *pair) for pair, n in of.items())
        if stretch.in_full:
            gradient = sum(every for _, every in layers)
        found.append(Phase(stretch.steps, size * (dense + active), size * (dense + gradient)))
    return found


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps with the same topology.

    `in_full`: whether they compute dense gradients; `moved`: whether there was an update before.
    """

    first: int
    steps: int
    in_full: bool
    moved: bool


@lru_cache(maxsize=8)  # searches ask for the same one again and again
def stretches(method: Method, steps: int) -> tuple[Stretch, ...]:
    """The stretches of a run of `steps`, in order."""
    found: list[Stretch] = []
    moved_before = False
    for step in range(1, steps + 1):
        moves = method.is_update(step - 1) or method.trains(step) != method.trains(step - 1)
        moved = step > 1 and moves
        moved_before |= moved
        in_full = method.needs_dense_gradient(step)
        if found and not moved and found[-1].in_full == in_full:
            found[-1] = replace(found[-1], steps=found[-1].steps + 1)
        else:
            found.append(Stretch(step, 1, in_full, moved_before))
    return tuple(found)
