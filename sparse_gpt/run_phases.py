"""What the steps of a run cost in its sparse layers, before it starts."""

from collections import Counter
from collections.abc import Iterable

from sparse_gpt.config import RunConfig
from sparse_gpt.model.run_flops import Phase
from sparse_gpt.run_method import method_of
from sparse_gpt.run_scoring import scoring_phases


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
    active = trained = 0
    for step in range(1, config.total_steps(world_size) + 1):
        moved = method.is_update(step - 1) or method.trains(step) != method.trains(step - 1)
        if step == 1 or moved:
            # The first topology is made a layer at a time.
            of = alike if step == 1 else model
            active = sum(n * method.active_after(step - 1, *pair) for pair, n in of.items())
            trained = sum(n * method.trained_after(step - 1, *pair) for pair, n in of.items())
        in_full = method.needs_dense_gradient(step)
        gradient = sum(every for _, every in layers) if in_full else trained
        each = size * (dense + active), size * (dense + gradient)
        if found and (found[-1].active, found[-1].gradient) == each:
            found[-1] = Phase(found[-1].steps + 1, *each)
        else:
            found.append(Phase(1, *each))
    return found
