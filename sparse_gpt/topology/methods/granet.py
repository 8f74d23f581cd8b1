"""GraNet (Liu et al. 2021): gradual pruning with zero-cost neuroregeneration."""

from dataclasses import dataclass

from sparse_gpt.topology.methods.base import Sets, Update, counts_after, drop_and_grow
from sparse_gpt.topology.methods.gmp import GMP
from sparse_gpt.topology.units import Units


@dataclass(frozen=True)
class GraNet(GMP):
    """Prunes along GMP's cubic, then drops and regrows by gradient at the same count.

    Pruned and dropped weights are 0 with their moments; unlike GMP's they may come back.
    """

    name = "granet"
    growth = "gradient"
    selects = ("largest magnitude", "smallest magnitude", "largest gradient")

    def update(self, units: Units, sets: Sets, targets: list[int], step: int) -> Update:
        before = sets.forward
        kept = units.best(
            "largest magnitude", before, counts_after(self, units, before, targets, step)
        )
        moved = drop_and_grow(units, kept, self.schedule.drop_fraction(step), "largest gradient")
        return Update(moved.sets, moved.dropped + sum(before.sizes) - sum(kept.sizes))
