"""Top-KAST (Jayakumar et al. 2020): sparse forward, less sparse backward, dense storage."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from sparse_gpt.topology.methods.base import Method, Sets, Update
from sparse_gpt.topology.units import Units, UnitSet


@dataclass(frozen=True)
class TopKAST(Method):
    """A are the D units largest in magnitude of all, B those and the largest M of the others.

    Weights outside B keep their values, get no gradient and have no moments. The exploration
    regulariser is an L2 term on B, of `regulariser` on A and `regulariser / D` (D the density) on
    what B has besides (the paper, section 2.3), whose gradient joins the loss's before clipping.
    `backward_sparsity`: of B.
    """

    backward_sparsity: float = 0.0
    regulariser: float = 1e-4

    name = "top_kast"
    stores_all = True
    selects = ("largest magnitude", "largest magnitude")

    def trains(self, step: int) -> Literal["forward", "more", "all"]:
        return "more"

    def trained_after(self, step: int, target: int, total: int) -> int:
        return max(target, round((1 - Fraction(str(self.backward_sparsity))) * total))

    def start(self, units: Units, everything: UnitSet, counts: list[int]) -> Sets:
        return self._sets(units, everything, counts)

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        active = sets.forward
        everything = active | ~active
        counts = [sum(targets)] if units.whole_model else targets
        return Update(self._sets(units, everything, counts), 0)

    def _sets(self, units: Units, everything: UnitSet, counts: list[int]) -> Sets:
        totals = [sum(everything.totals)] if units.whole_model else everything.totals
        trained = [self.trained_after(0, *pair) for pair in zip(counts, totals, strict=True)]
        forward = units.pattern("largest magnitude", everything, counts)
        more = [many - active for many, active in zip(trained, counts, strict=True)]
        return Sets(forward, forward | units.best("largest magnitude", ~forward, more))

    def regularisation(self) -> float:
        return self.regulariser
