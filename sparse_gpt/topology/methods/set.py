"""SET (Mocanu et al. 2018): drop by magnitude, grow at random."""

from dataclasses import dataclass

from sparse_gpt.topology.methods.base import Method, Sets, Update, drop_and_grow
from sparse_gpt.topology.units import Units


@dataclass(frozen=True)
class Set(Method):
    """Weights outside the mask, and their moments, are exactly zero; so are new ones."""

    name = "set"
    growth = "random"
    selects = ("smallest magnitude", "random")

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        return drop_and_grow(units, sets.forward, self.schedule.drop_fraction(step), "random")
