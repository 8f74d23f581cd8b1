"""What a sparse training method has to say about itself."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Growth = Literal["none", "random", "gradient"]


@dataclass(frozen=True)
class Method:
    """A method: how it grows, and its update as a pure function of scores.

    `growth` tells the controller which scores to provide: none (the topology never changes),
    random ones, or those of the averaged dense gradient of the whole global batch.
    """

    name: str
    growth: Growth

    @property
    def dynamic(self) -> bool:
        return self.growth != "none"

    def update(self, active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
        """New active units from the old ones; `count` of them change at most."""
        raise TypeError(f"method {self.name!r} has no topology update")
