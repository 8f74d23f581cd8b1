"""What the steps of a run cost in its sparse layers, before it starts."""

from collections.abc import Iterable

from sparse_gpt.config import RunConfig
from sparse_gpt.model.run_flops import Phase
from sparse_gpt.topology.methods import METHODS


def topology_updates(config: RunConfig, world_size: int) -> int:
    """Steps of the run in which the topology changes."""
    if not METHODS[config.sparsity.algorithm].dynamic:
        return 0
    last = min(config.update_stop(world_size) - 1, config.total_steps(world_size))
    return max(0, last) // config.sparsity.update.freq


def phases(config: RunConfig, units: Iterable[tuple[int, int]], world_size: int) -> list[Phase]:
    """The steps of a run, those together that cost the same.

    `units`: (kept, all) weights or blocks of every sparse layer.
    """
    pairs, size = list(units), config.block_size
    kept, total = size * sum(k for k, _ in pairs), size * sum(n for _, n in pairs)
    steps, dense = config.total_steps(world_size), 0
    if METHODS[config.sparsity.algorithm].growth == "gradient":
        dense = topology_updates(config, world_size)
    return [Phase(steps - dense, kept, kept), Phase(dense, kept, total)]
