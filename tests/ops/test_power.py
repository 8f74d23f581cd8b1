"""Powerpropagation: w = theta |theta|^(alpha - 1), its gradient, and its inverse."""

import pytest
import torch

from sparse_gpt.ops import inverse_power, power

ALPHAS = [1.5, 2.0, 3.0]


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_the_power_keeps_signs(alpha):
    theta = torch.tensor([-2.0, -0.5, 0.0, 0.25, 3.0], dtype=torch.float64)
    wanted = [(-1 if t < 0 else 1) * abs(t) ** alpha for t in theta.tolist()]
    assert power(theta, alpha).tolist() == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient(alpha):
    generator = torch.Generator().manual_seed(1)
    theta = torch.rand(4, 5, generator=generator, dtype=torch.float64) + 0.1
    theta = (theta * torch.randn(4, 5, generator=generator).sign()).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: power(t, alpha), (theta,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_at_zero_is_zero(alpha, dtype):
    """The slope alpha |theta|^(alpha - 1) is: a weight that is 0 stays 0."""
    theta = torch.tensor([0.0, -0.0, 1e-20, 2.0], dtype=dtype, requires_grad=True)
    (power(theta, alpha) * torch.tensor([5.0, -5.0, 1.0, 1.0])).sum().backward()
    assert theta.grad is not None
    assert theta.grad.isfinite().all()
    assert theta.grad[:2].tolist() == [0.0, 0.0]
    assert theta.grad[3].item() == pytest.approx(alpha * 2.0 ** (alpha - 1), rel=1e-2)


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS])
def test_inverse(alpha):
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    weight[0] = 0.0
    made = power(inverse_power(weight, alpha), alpha)
    assert made[0] == 0.0
    torch.testing.assert_close(made, weight, rtol=1e-5, atol=0.0)
