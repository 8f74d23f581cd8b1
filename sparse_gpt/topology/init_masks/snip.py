"""SNIP (Lee et al. 2019): keep the weights whose removal changes the loss most."""

from torch import Tensor


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """Connection sensitivity |w * dL/dw|: the derivative of the loss by a gate on the weight.

    `weight` and `gradient` of any one shape; the paper divides by the sum over the model, which
    orders nothing anew.
    """
    return (weight * gradient).abs_()
