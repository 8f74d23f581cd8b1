"""Top-KAST (Jayakumar et al. 2020): sparse forward, less sparse backward, dense storage."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from sparse_gpt.topology.methods.base import Method, Sets, Update, compared
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
        more = [
            self.trained_after(0, count, total) - count
            for count, total in zip(counts, everything.totals, strict=True)
        ]
        forward = units.pattern("largest magnitude", everything, compared(units, counts))
        beyond = units.best("largest magnitude", ~forward, compared(units, more))
        return Sets(forward, forward | beyond)

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        everything = sets.forward | ~sets.forward
        return Update(self.start(units, everything, targets), 0)

    def regularisation(self) -> float:
        return self.regulariser
