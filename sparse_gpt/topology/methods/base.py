"""What a sparse training method has to say about itself."""

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.units import Score, Units, UnitSet


@dataclass(frozen=True)
class Sets:
    """The sets of a batch of layers: forward A, and trained B where that is another set.

    `trained` is None where B is A, or everything (`Method.trains`).
    """

    forward: UnitSet
    trained: UnitSet | None = None


@dataclass(frozen=True)
class Update:
    """New sets, and how many units were taken out of A before any came in."""

    sets: Sets
    dropped: int


@dataclass(frozen=True)
class Method(ABC):
    """A method: when the topology changes, and to what.

    What the controller must know of it:

    - `growth`: what it grows by. `gradient` asks for the averaged dense gradient of the whole
      global batch on the steps of `needs_dense_gradient`.
    - `stores_all`: whether weights outside A keep their values (C is everything). Otherwise they,
      and their moments, are exactly 0 (C is A).
    - `trains`: in step t B is A (`forward`), a set of its own (`more`), or every weight (`all`).

    Counts are pure functions of the step: `active_after(t)` is |A| once step t is done (0: at the
    start) of a layer of `total` units whose final number is `target`; the forward pass of step t
    uses A as step t - 1 left it. The ledger and the plan count by them.
    """

    schedule: UpdateSchedule

    name: ClassVar[str]
    growth: ClassVar[Literal["none", "random", "gradient"]] = "none"
    stores_all: ClassVar[bool] = False
    dynamic: ClassVar[bool] = True
    selects: ClassVar[tuple[Score, ...]] = ()  # by which scores an update chooses, in order

    def is_update(self, step: int) -> bool:
        """Whether the topology changes in step t (from 1)."""
        return self.dynamic and self.schedule.is_update(step)

    def needs_dense_gradient(self, step: int) -> bool:
        """Whether step t needs the dense gradient, to grow by."""
        return self.growth == "gradient" and self.is_update(step)

    def trains(self, step: int) -> Literal["forward", "more", "all"]:
        """What the optimizer moves in step t."""
        return "forward"

    def active_after(self, step: int, target: int, total: int) -> int:
        """Units in A after step t."""
        return target

    def trained_after(self, step: int, target: int, total: int) -> int:
        """Units in B of step t + 1."""
        everything = self.trains(step + 1) == "all"
        return total if everything else self.active_after(step, target, total)

    def start(self, units: Units, everything: UnitSet, counts: list[int]) -> Sets:
        """The first sets: `counts` units of every layer at random. A collective."""
        return Sets(units.pattern("random", everything, counts))

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        """New sets in step t; `targets` are the layers' final numbers of units. A collective."""
        raise TypeError(f"method {self.name!r} has no topology update")

    def update_index(self, step: int) -> int:
        """A number of the update of step t, from 1: what random choices are keyed on."""
        return self.schedule.update_index(step)

    def is_behind(self, step: int, active: int, target: int, total: int) -> bool:
        """Whether |A| before step t is not what it should be: the step that should have made it
        so was not finite."""
        return False

    def resets_moments(self, step: int) -> bool:
        """Whether the update of step t makes all moments of the sparse weights 0."""
        return False

    def outside_factor(self, step: int) -> float | None:
        """What weights outside A are multiplied with after step t; None: they are left alone."""
        return None

    def regularisation(self) -> float:
        """Strength of an L2 term on B that is added to the gradient (Top-KAST)."""
        return 0.0


def counts_after(
    method: Method, units: Units, of: UnitSet, targets: list[int], step: int
) -> list[int]:
    """|A| after step t for `Units.best`: one a layer, or one in all for the whole model."""
    if units.whole_model:
        return [method.active_after(step, sum(targets), sum(of.totals))]
    return [method.active_after(step, *pair) for pair in zip(targets, of.totals, strict=True)]


def drop_and_grow(units: Units, active: UnitSet, fraction: float, growth: Score) -> Update:
    """Drop the smallest `fraction` of the active units, then grow as many by a score.

    Candidates for growth are all units inactive AFTER the drop, the just-dropped ones included
    (FACTS section 5). Ties go to the lower index, in dropping and in growing. The number of
    active units does not change: in every layer, or over the model where that is the scope, and
    in every group of a structure that has such.
    """
    counts = units.share(active, fraction)
    kept = active - units.best("smallest magnitude", active, counts)
    return Update(Sets(kept | units.grow(growth, kept, active, counts)), sum(counts))
