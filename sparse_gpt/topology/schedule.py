"""When the topology changes, and by how much."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateSchedule:
    """Updates at steps t = freq, 2 freq, ... < stop (t counts optimizer steps from 1).

    The drop fraction is f(t) = init/2 (1 + cos(pi t / half_period)) (RigL, eq. 1; Sparse-IFT's
    GPT recipe: init 0.3, freq 100, stop at 75 %), or constant.
    """

    freq: int
    stop: int
    init: float = 0.3
    half_period: int | None = None
    kind: str = "cosine"

    def is_update(self, step: int) -> bool:
        """Whether the topology changes at step t (from 1)."""
        return 0 < step < self.stop and step % self.freq == 0

    def last_update(self, step: int) -> int:
        """The step of the last update up to step t; 0 where there was none."""
        return max(0, min(step, self.stop - 1)) // self.freq * self.freq

    def drop_fraction(self, step: int) -> float:
        """Share of the active weights that is dropped at step t."""
        if self.kind == "constant":
            return self.init
        period = self.half_period or self.stop
        return self.init / 2 * (1 + math.cos(math.pi * min(step, period) / period))

    def update_index(self, step: int) -> int:
        """Number of the update at step t, from 1: what random choices are keyed on."""
        return step // self.freq
