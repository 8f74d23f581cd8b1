"""Every kernel against the reference, and the reference against arithmetic written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.ops import KERNELS, Pattern, resolve_kernel

KERNEL_NAMES = sorted(set(KERNELS) - {"semi_structured"})  # one structure, one device: its own
BLOCKS = [(1, 1), (4, 4), (2, 8), (8, 1), (1, 4)]


def operands(
    out: int, inner: int, block: tuple[int, int], tokens=(3, 5), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Pattern]:
    """x, weight, bias in fp64 and a pattern with about half its blocks active."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    active = torch.rand(out // block[0], inner // block[1], generator=generator) < 0.5
    return normal(*tokens, inner), normal(out, inner), normal(out), Pattern(active, block)


def by_hand(x, weight, bias, pattern, dy, grad) -> tuple[Tensor, ...]:
    """(y, dx, dw, db) from the formulas, block by block, without autograd."""
    mask = torch.zeros_like(weight)
    b_out, b_in = pattern.block
    for row, column in pattern.active.nonzero().tolist():
        mask[row * b_out : (row + 1) * b_out, column * b_in : (column + 1) * b_in] = 1
    effective = mask * weight
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    y = x @ effective.T + (0 if bias is None else bias)
    dw = dy_rows.T @ rows * (1 if grad == "dense" else mask)
    return y, dy @ effective, dw, dy_rows.sum(0)


def run(kernel, x, weight, bias, pattern, dy, grad) -> tuple[Tensor | None, ...]:
    """(y, dx, dw, db) of a kernel by autograd; db is None without a bias."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = KERNELS[kernel](leaves[0], leaves[1], leaves[2], pattern, grad)
    y.backward(dy)
    return (y.detach(), *(None if t is None else t.grad for t in leaves))


@pytest.mark.parametrize("grad", ["active", "dense"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_forward_and_gradients(kernel, block, grad):
    x, weight, bias, pattern = operands(24, 16, block)
    dy = torch.randn(3, 5, 24, dtype=torch.float64)
    expected = by_hand(x, weight, bias, pattern, dy, grad)
    for got, wanted in zip(run(kernel, x, weight, bias, pattern, dy, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_without_bias(kernel):
    x, weight, _, pattern = operands(8, 16, (4, 4))
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    y, dx, dw, db = run(kernel, x, weight, None, pattern, dy, "active")
    assert db is None
    expected = by_hand(x, weight, None, pattern, dy, "active")
    for got, wanted in zip((y, dx, dw), expected):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_gradcheck(kernel, block):
    x, weight, bias, pattern = operands(6, 8, block, tokens=(3,))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *inputs: KERNELS[kernel](*inputs, pattern, "active"), leaves
    )


@pytest.mark.parametrize("grad", ["active", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_precisions(kernel, dtype, grad):
    x, weight, bias, pattern = operands(32, 64, (4, 8))
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    dy = torch.randn(3, 5, 32).to(dtype)
    exact = by_hand(x.double(), weight.double(), bias.double(), pattern, dy.double(), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, wanted in zip(run(kernel, x, weight, bias, pattern, dy, grad), exact, strict=True):
        assert got is not None and got.dtype == dtype
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("grad", ["active", "dense"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_what_lies_outside_the_pattern_is_not_read(kernel, garbage, grad):
    x, weight, bias, pattern = operands(24, 16, (2, 8))
    dy = torch.randn(3, 5, 24, dtype=torch.float64)
    clean = run(kernel, x, pattern.apply(weight), bias, pattern, dy, grad)
    weight[~pattern.expand()] = garbage
    for got, wanted in zip(run(kernel, x, weight, bias, pattern, dy, grad), clean, strict=True):
        assert got is not None and wanted is not None
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_inactive_gradients_are_exactly_zero(kernel):
    x, weight, bias, pattern = operands(24, 16, (4, 4))
    dw = run(kernel, x, weight, bias, pattern, torch.ones(3, 5, 24).double(), "active")[2]
    assert dw is not None
    assert torch.count_nonzero(dw[~pattern.expand()]) == 0
    assert torch.count_nonzero(dw[pattern.expand()]) == pattern.expand().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_all_active_is_the_dense_layer_bit_for_bit(kernel, dtype):
    x, weight, bias, _ = operands(24, 16, (1, 1))
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    full = Pattern(torch.ones(6, 2, dtype=torch.bool), (4, 8))
    dy = torch.randn(3, 5, 24).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = F.linear(*leaves)
    y.backward(dy)
    got = run(kernel, x, weight, bias, full, dy, "active")
    assert torch.equal(torch.as_tensor(got[0]), y)
    for gradient, leaf in zip(got[1:], leaves, strict=True):
        assert gradient is not None and leaf.grad is not None
        assert torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_empty_rows_and_columns_and_an_empty_layer(kernel):
    x, weight, bias, _ = operands(8, 6, (1, 1))
    dy = torch.randn(3, 5, 8, dtype=torch.float64)
    for kept in ([(0, 0)], [(3, 2), (3, 1)], []):
        active = torch.zeros(4, 3, dtype=torch.bool)
        for position in kept:
            active[position] = True
        pattern = Pattern(active, (2, 2))
        expected = by_hand(x, weight, bias, pattern, dy, "active")
        got = run(kernel, x, weight, bias, pattern, dy, "active")
        for one, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(one, wanted)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(KERNEL_NAMES),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.sampled_from([(1,), (1, 1), (7,), (2, 1), (2, 3), (2, 2, 2)]),
    grad=st.sampled_from(["active", "dense"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(kernel, rows, columns, block, tokens, grad, seed):
    out, inner = rows * block[0], columns * block[1]
    x, weight, bias, pattern = operands(out, inner, block, tokens, seed)
    dy = torch.randn(*tokens, out, dtype=torch.float64)
    expected = by_hand(x, weight, bias, pattern, dy, grad)
    for got, wanted in zip(run(kernel, x, weight, bias, pattern, dy, grad), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_only_the_gradients_asked_for(kernel):
    x, weight, bias, pattern = operands(8, 6, (2, 2))
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias))]
        KERNELS[kernel](*leaves, pattern, "active").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_operands_that_are_not_contiguous(kernel):
    x, weight, bias, pattern = operands(8, 6, (2, 2))
    x, weight = x.transpose(0, 1), weight.t().contiguous().t()
    dy = torch.randn(3, 5, 8, dtype=torch.float64).transpose(0, 1)
    expected = by_hand(x, weight, bias, pattern, dy, "active")
    for got, wanted in zip(run(kernel, x, weight, bias, pattern, dy, "active"), expected):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_a_pattern_of_another_shape_is_an_error(kernel):
    x, weight, bias, _ = operands(8, 6, (1, 1))
    with pytest.raises((ValueError, RuntimeError)):
        KERNELS[kernel](x, weight, bias, Pattern(torch.ones(4, 4, dtype=torch.bool)), "active")


def test_the_choice_of_kernel():
    cpu = torch.device("cpu")
    assert resolve_kernel("auto", cpu) is KERNELS["masked"]
    assert resolve_kernel("reference", cpu) is KERNELS["reference"]
    with pytest.raises(UserError, match=r"sparsity\.kernel: no kernel 'fast'; .* auto, masked"):
        resolve_kernel("fast", cpu)
