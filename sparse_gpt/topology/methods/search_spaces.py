"""Algorithm 1 of "Search spaces" (Stosic & Stosic 2021, paper 002): all weights are trained."""

from dataclasses import dataclass
from typing import Literal

from sparse_gpt.topology.methods.base import Method, Sets, Update, compared
from sparse_gpt.topology.units import Units, UnitSet


@dataclass(frozen=True)
class SearchSpaces(Method):
    """The largest magnitudes take part in the loss; the optimizer moves every weight.

    Weights that did not take part in a step (n) are then kept from adding noise, by `exploit`:
    `fix` stops rewiring in step v and makes them 0 for good, with their moments; `reset` makes
    them 0 every z steps; `regularize` takes beta of them away after every step. That comes before
    the next choice: reset in every step, they never take part (section 3.2). Their moments are
    the optimizer's own until `fix`.
    """

    exploit: Literal["fix", "reset", "regularize"] = "reset"
    v: int = 1
    z: int = 1000
    beta: float = 2e-4

    name = "search_spaces"
    stores_all = True
    selects = ("largest magnitude",)

    def trains(self, step: int) -> Literal["forward", "more", "all"]:
        return "forward" if self.is_fixed(step - 1) else "all"

    def is_fixed(self, step: int) -> bool:
        return self.exploit == "fix" and step >= self.v

    def is_update(self, step: int) -> bool:
        return super().is_update(step) and not self.is_fixed(step)

    def start(self, units: Units, everything: UnitSet, counts: list[int]) -> Sets:
        return Sets(units.pattern("largest magnitude", everything, compared(units, counts)))

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        everything = sets.forward | ~sets.forward
        return Update(self.start(units, everything, targets), 0)

    def outside_factor(self, step: int) -> float | None:
        if self.exploit == "fix":
            # In every step: the one at v may not have been finite.
            return 0.0 if self.is_fixed(step) else None
        if self.exploit == "reset":
            return 0.0 if step % self.z == 0 else None
        return 1.0 - self.beta
