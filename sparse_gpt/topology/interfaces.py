"""What a controller of the topology is given, and what it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sparse_gpt.topology.units import Units

Together = Callable[[Callable[[], object]], None]


def call(action: Callable[[], object]) -> None:
    """`Together` of one rank alone."""
    action()


@dataclass(frozen=True)
class UpdateReport:
    """One topology update: active units, how many were dropped, and how many of those stayed out.

    `churn` is the share of active units that are new. `growth_bytes`: the most memory that scores
    of growth took on a rank, where compact storage gathers them.
    """

    active: int
    dropped: int
    replaced: int
    growth_bytes: int = 0

    @property
    def churn(self) -> float:
        return self.replaced / max(1, self.active)


class SavedMasks(Protocol):
    """Where masks are read from: a checkpoint."""

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """bool `[count]`: units `start .. start + count - 1` of a layer's A, or of its B."""
        ...


class UnitSource(Protocol):
    """What makes the units of layers: `Scorer`, or that of another storage."""

    shapes: dict[str, tuple[int, int]]

    def units(self, names: list[str], index: int, scored: bool, whole_model: bool) -> Units:
        """See `Scorer.units`."""
        ...
