"""AC/DC (Peste et al. 2021) and AC/DC++ (paper 003): sparse and dense phases in turn."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from sparse_gpt.topology.methods.base import Method, Sets, Update, counts_after
from sparse_gpt.topology.units import Units


@dataclass(frozen=True)
class ACDC(Method):
    """Dense for `warmup` of the run, then phases of `phase` each, the first of them sparse.

    The run ends with a dense phase of `last_dense` and a sparse one of `last_sparse` (the authors'
    code: 75-85 and 85-100 epochs of 100). Compression keeps the largest magnitudes; the others
    and their moments are exactly 0. In dense phases all weights take part; with `dense_sparsity`
    (sparse decompression, paper 003 section 3.7) those after a sparse phase leave that share out:
    what was active stays, units drawn at random join it, and the set is fixed for the phase.
    Weights that come back start at 0 with zero moments; `reset_moments` zeroes those of all
    sparse weights at every switch.
    """

    total_steps: int = 1
    warmup: float = 0.10
    phase: float = 0.05
    last_dense: float = 0.10
    last_sparse: float = 0.15
    dense_sparsity: float = 0.0
    reset_moments: bool = False

    name = "ac_dc"
    growth = "random"
    selects = ("largest magnitude",)

    @cached_property
    def switches(self) -> tuple[int, ...]:
        """Steps after which the phase changes: to sparse, to dense, ..., to sparse for good."""
        warmup, phase, dense, sparse = (
            Fraction(str(f)) for f in (self.warmup, self.phase, self.last_dense, self.last_sparse)
        )
        end = 1 - dense - sparse
        # As many whole pairs as fit, and the sparse phase before the last dense one.
        many = max(1, round((end - warmup) / phase))
        many += 1 - many % 2
        at = [warmup + (end - warmup) * i / many for i in range(many + 1)] + [1 - sparse]
        return tuple(int(f * self.total_steps) for f in at)

    def is_update(self, step: int) -> bool:
        return step in self.switches

    def update_index(self, step: int) -> int:
        return step

    def makes_up(self, step: int) -> bool:
        return step > self.switches[0]

    def is_sparse(self, step: int) -> bool:
        """Whether the phase after step t is a sparse one."""
        return sum(switch <= step for switch in self.switches) % 2 == 1

    def active_after(self, step: int, target: int, total: int) -> int:
        if self.is_sparse(step):
            return target
        if step < self.switches[0]:
            return total
        return max(target, round((1 - Fraction(str(self.dense_sparsity))) * total))

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        active = sets.forward
        counts = counts_after(self, units, active, targets, step)
        sizes = [sum(active.sizes)] if units.whole_model else active.sizes
        if sizes == counts:  # a whole phase was missed
            return Update(sets, 0)
        if sum(sizes) > sum(counts):
            kept = units.pattern("largest magnitude", active, counts)
            return Update(Sets(kept), sum(active.sizes) - sum(kept.sizes))
        missing = [many - there for many, there in zip(counts, sizes, strict=True)]
        return Update(Sets(active | units.best("random", ~active, missing)), 0)

    def resets_moments(self, step: int) -> bool:
        return self.reset_moments
