"""What a sparse training method has to say about itself."""

from dataclasses import dataclass
from typing import Literal

from sparse_gpt.topology.units import Units, UnitSet

Growth = Literal["none", "random", "gradient"]


@dataclass(frozen=True)
class Method:
    """A method: how it grows, and its update in terms of units and their scores.

    `growth` tells the controller what to provide: none (the topology never changes), random
    scores, or the averaged dense gradient of the whole global batch.
    """

    name: str
    growth: Growth

    @property
    def dynamic(self) -> bool:
        return self.growth != "none"

    def update(self, units: Units, active: UnitSet, fraction: float) -> UnitSet:
        """New active units from the old ones; `fraction` of them are dropped. A collective."""
        raise TypeError(f"method {self.name!r} has no topology update")
