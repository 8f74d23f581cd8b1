"""FLOPs of a whole training run: what its ledger will show at its end, in exact integers.

A step costs, a sequence, three products (forward, dX, dW) with every weight. Of a sparse layer
forward and dX take the active weights A, and dW those that get a gradient: the trained set B, or
all where a dense gradient is asked for (RigL's updates, dense phases).
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same: weights of all sparse layers in forward and dX, and in dW."""

    steps: int
    active: int
    gradient: int


def run_flops(rest: int, seq_len: int, batch: int, phases: Iterable[Phase]) -> int:
    """FLOPs of the steps of `phases`, of `batch` sequences each.

    `rest`: forward and backward FLOPs of a sequence outside the sparse layers: attention scores,
    softmax, LM head, projections, dense layers (`sequence_flops` with 0 active weights).
    """
    return batch * sum(
        phase.steps * (rest + 2 * seq_len * (2 * phase.active + phase.gradient)) for phase in phases
    )
