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
    start) of a layer of `total` units whose final number is `target`, and its sum over layers
    where updates compare the whole model; the forward pass of step t uses A as step t - 1 left
    it. The ledger and the plan count by them.
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
        """The first sets, of `counts` units of each layer: drawn at random. A collective."""
        return Sets(units.pattern("random", everything, counts))

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        """New sets in step t; `targets` are the layers' final numbers of units. A collective."""
        raise TypeError(f"method {self.name!r} has no topology update")

    def update_index(self, step: int) -> int:
        """A number of the update of step t, from 1: what random choices are keyed on."""
        return self.schedule.update_index(step)

    def makes_up(self, step: int) -> bool:
        """Whether an update is due in step t if |A| is not `active_after(t - 1)`: the step that
        should have made it so was not finite."""
        return False

    def resets_moments(self, step: int) -> bool:
        """Whether the update of step t makes all moments of the sparse weights 0."""
        return False

    def outside_factor(self, step: int) -> float | None:
        """What weights outside the A of step t are multiplied with after the optimizer has moved
        them, and before A changes; None: they are left alone."""
        return None

    def is_fixed(self, step: int) -> bool:
        """Whether what is outside A stays 0 from step t on, moments included, though it was kept
        before."""
        return False

    def regularisation(self) -> float:
        """lambda of a term lambda / 2 |w|^2 on A, and lambda / (2 D) |w|^2 on the rest of B,
        whose gradient joins the loss's; D is the density of A. 0: there is none."""
        return 0.0


def counts_after(
    method: Method, units: Units, of: UnitSet, targets: list[int], step: int
) -> list[int]:
    """|A| after step t for `Units.best`: one a layer, or their sum for the whole model."""
    counts = [method.active_after(step, *pair) for pair in zip(targets, of.totals, strict=True)]
    return compared(units, counts)


def compared(units: Units, counts: list[int]) -> list[int]:
    """Layers' counts as `Units.best` takes them: their sum where the whole model is compared."""
    return [sum(counts)] if units.whole_model else counts


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
