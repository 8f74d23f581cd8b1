"""RigL (Evci et al. 2020): drop by magnitude, grow by the largest dense gradient."""

from dataclasses import dataclass

from sparse_gpt.topology.methods.base import Method, Sets, Update, drop_and_grow
from sparse_gpt.topology.units import Units


@dataclass(frozen=True)
class RigL(Method):
    """Weights outside the mask, and their moments, are exactly zero; so are new ones."""

    name = "rigl"
    growth = "gradient"
    selects = ("smallest magnitude", "largest gradient")

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        fraction = self.schedule.drop_fraction(step)
        return drop_and_grow(units, sets.forward, fraction, "largest gradient")
