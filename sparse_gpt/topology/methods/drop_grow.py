"""Drop and grow: the update that SET and RigL share."""

from sparse_gpt.topology.methods.base import Method
from sparse_gpt.topology.units import Score, Units, UnitSet


def drop_and_grow(units: Units, active: UnitSet, fraction: float, growth: Score) -> UnitSet:
    """Drop the smallest `fraction` of the active units, then grow as many by a score.

    Candidates for growth are all units inactive AFTER the drop, the just-dropped ones included
    (FACTS section 5). Ties go to the lower index, in dropping and in growing. The number of
    active units does not change: in every layer, or over the model where that is the scope, and
    in every group of a structure that has such.
    """
    counts = units.share(active, fraction)
    kept = active - units.best("smallest magnitude", active, counts)
    return kept | units.grow(growth, kept, active, counts)


class DropAndGrow(Method):
    """SET and RigL: weights outside the mask, and their moments, are exactly zero."""

    def update(self, units: Units, active: UnitSet, fraction: float) -> UnitSet:
        growth: Score = "largest gradient" if self.growth == "gradient" else "random"
        return drop_and_grow(units, active, fraction, growth)
