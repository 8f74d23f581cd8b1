"""Algorithm 1 of "Search spaces" (Stosic & Stosic 2021, paper 002): all weights are trained."""

from dataclasses import dataclass
from typing import Literal

from sparse_gpt.topology.methods.base import Method, Sets, Update
from sparse_gpt.topology.units import Units, UnitSet


@dataclass(frozen=True)
class SearchSpaces(Method):
    """The largest magnitudes take part in the loss; the optimizer moves every weight.

    Weights that do not take part (n) are then kept from adding noise, by `exploit`: `fix` stops
    rewiring in step v and makes them 0 for good; `reset` makes them 0 every z steps;
    `regularize` takes beta of them away after every step.
    """

    exploit: Literal["fix", "reset", "regularize"] = "reset"
    v: int = 1
    z: int = 1000
    beta: float = 2e-4

    name = "search_spaces"
    stores_all = True
    selects = ("largest magnitude",)

    def trains(self, step: int) -> Literal["forward", "more", "all"]:
        return "forward" if self._fixed(step - 1) else "all"

    def _fixed(self, step: int) -> bool:
        return self.exploit == "fix" and step >= self.v

    def is_update(self, step: int) -> bool:
        return super().is_update(step) and not self._fixed(step)

    def start(self, units: Units, everything: UnitSet, counts: list[int]) -> Sets:
        return Sets(units.pattern("largest magnitude", everything, counts))

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        active = sets.forward
        counts = [sum(targets)] if units.whole_model else targets
        return Update(Sets(units.pattern("largest magnitude", active | ~active, counts)), 0)

    def outside_factor(self, step: int) -> float | None:
        if self.exploit == "fix":
            return 0.0 if step == self.v else None
        if self.exploit == "reset":
            return 0.0 if step % self.z == 0 else None
        return 1.0 - self.beta
