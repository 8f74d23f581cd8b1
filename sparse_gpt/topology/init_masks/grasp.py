"""GraSP (Wang et al. 2020): keep the weights whose removal would hurt the gradient flow most."""

from torch import Tensor


def gradient_flow(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """theta * (H g), signed: larger is kept (equation 8's -theta * H g, which it removes the top
    of).

    To first order, taking a weight away changes g^T g by twice -theta * (H g): what is negative
    here stands in the way of the gradient flow.
    """
    return weight * hessian_gradient
