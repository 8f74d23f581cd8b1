"""Gradual magnitude pruning (Zhu & Gupta 2017): from dense to sparse along a cubic."""

from dataclasses import dataclass
from fractions import Fraction

from sparse_gpt.topology.methods.base import Method, Sets, Update, counts_after
from sparse_gpt.topology.units import Units


def cubic(step: int, begin: int, end: int, first: int, last: int) -> int:
    """Units at step t on the way from `first` to `last` (Zhu & Gupta, eq. 1), rounded half up.

    s_t = s_f + (s_i - s_f)(1 - (t - begin) / (end - begin))^3, in counts: exact at both ends.
    """
    if step >= end:
        return last
    rest = Fraction(end - max(step, begin), end - begin) ** 3
    return last + int((first - last) * rest + Fraction(1, 2))


@dataclass(frozen=True)
class GMP(Method):
    """Keeps the largest of what is left. A pruned weight is 0 with its moments, and stays out.

    Updates at every multiple of `freq` up to the last one before `stop`, which reaches the
    target; the mask is fixed from there on. The cubic begins at step 0.
    """

    initial_sparsity: float = 0.0

    name = "gmp"
    selects = ("largest magnitude",)

    def _first(self, target: int, total: int) -> int:
        return max(target, round((1 - Fraction(str(self.initial_sparsity))) * total))

    def active_after(self, step: int, target: int, total: int) -> int:
        first, at = self._first(target, total), self.schedule.last_update(step)
        if at == 0:
            return first
        return cubic(at, 0, self.schedule.last_update(self.schedule.stop), first, target)

    def makes_up(self, step: int) -> bool:
        return self.schedule.last_update(step - 1) > 0

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        counts = counts_after(self, units, sets.forward, targets, step)
        kept = units.best("largest magnitude", sets.forward, counts)
        return Update(Sets(kept), sum(sets.forward.sizes) - sum(kept.sizes))
