"""Drop and grow: the step that SET and RigL share, as a pure function of scores."""

import torch
from torch import Tensor

from sparse_gpt.topology.methods.base import Method


def drop_and_grow(active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drop the `count` smallest active units, then grow the `count` best inactive ones.

    `active` bool, `magnitude` >= 0 and `growth` (any ordered dtype), all of one shape; returns
    the new mask. Candidates for growth are all units inactive AFTER the drop, the just-dropped
    ones included (FACTS section 5). Ties go to the lower index, in dropping and in growing. The
    number of active units does not change.
    """
    shape, active = active.shape, active.reshape(-1)
    magnitude, growth = magnitude.reshape(-1), growth.reshape(-1)
    if magnitude.is_floating_point() and not torch.isfinite(magnitude).all():
        raise ValueError("magnitudes are not finite: no topology update")
    if growth.is_floating_point() and not torch.isfinite(growth).all():
        raise ValueError("growth scores are not finite: no topology update")
    kept = active.nonzero().flatten()
    if not 0 <= count <= kept.numel():
        raise ValueError(f"cannot drop {count} of {kept.numel()} active units")
    if count == 0:
        return active.clone().view(shape)
    order = torch.sort(magnitude[kept], stable=True).indices
    result = active.clone()
    result[kept[order[:count]]] = False
    free = (~result).nonzero().flatten()
    order = torch.sort(growth[free], descending=True, stable=True).indices
    result[free[order[:count]]] = True
    return result.view(shape)


class DropAndGrow(Method):
    """SET and RigL: weights outside the mask, and their moments, are exactly zero."""

    def update(self, active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
        return drop_and_grow(active, magnitude, growth, count)
