"""RigL (Evci et al. 2020): drop by magnitude, grow by the largest dense gradient."""

from torch import Tensor

from sparse_gpt.topology.methods.base import Method
from sparse_gpt.topology.methods.drop_grow import drop_and_grow


class RigLMethod(Method):
    """Non-participating weights, and their moments, are exactly zero."""

    def update(self, active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
        return drop_and_grow(active, magnitude, growth, count)


RIGL = RigLMethod(name="rigl", growth="gradient")
