"""SET (Mocanu et al. 2018): drop by magnitude, grow at random."""

from torch import Tensor

from sparse_gpt.topology.methods.base import Method
from sparse_gpt.topology.methods.drop_grow import drop_and_grow


class SetMethod(Method):
    """Non-participating weights, and their moments, are exactly zero."""

    def update(self, active: Tensor, magnitude: Tensor, growth: Tensor, count: int) -> Tensor:
        return drop_and_grow(active, magnitude, growth, count)


SET = SetMethod(name="set", growth="random")
