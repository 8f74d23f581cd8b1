"""What it costs to find a first topology before step 1 (`sparsity.init_mask`)."""

from collections.abc import Iterable

from sparse_gpt.config import RunConfig
from sparse_gpt.model.run_flops import Phase
from sparse_gpt.topology.init_masks.force import round_counts


def scoring_phases(config: RunConfig, units: Iterable[tuple[int, int]]) -> list[Phase]:
    """Global batches computed before step 1, those together that cost the same.

    `units`: (kept, all) units of every layer that can be sparse; one that keeps all is dense.

    SNIP computes `batches` dense steps. FORCE as many a round: forward and dX with the weights the
    last round kept, dW of all. GraSP costs four dense steps a batch: one for g; and for H g one
    for the graph and, through forward and backward of every product y = W x, six more products
    (two by the cotangent of dW, two by that of dX, two by that of y), which is two steps. Random
    masks and lottery tickets cost nothing.
    """
    sparsity, size = config.sparsity, config.block_size
    pairs = list(units)
    dense = sum(every for kept, every in pairs if kept == every)
    kept = sum(kept for kept, every in pairs if kept < every)
    total = sum(every for kept, every in pairs if kept < every)
    batches, everything = sparsity.scoring.batches, size * (dense + total)
    if not total or sparsity.init_mask in ("random", "lottery"):
        return []
    if sparsity.init_mask == "snip":
        return [Phase(batches, everything, everything)]
    if sparsity.init_mask == "grasp":
        return [Phase(4 * batches, everything, everything)]
    counts = [total, *round_counts(total, kept, sparsity.scoring.rounds)[:-1]]
    return [Phase(batches, size * (dense + count), everything) for count in counts]
