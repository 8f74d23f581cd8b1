"""Patterns: block grids over a weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.ops import Pattern


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_apply_expand_and_apply_in_place_agree(rows, columns, block, seed):
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, columns, generator=generator) < 0.5
    pattern = Pattern(active, block)
    out, inner = pattern.shape
    assert (out, inner) == (rows * block[0], columns * block[1])
    weight = torch.randn(out, inner, generator=generator)
    mask = pattern.expand()
    for i in range(out):
        for j in range(inner):
            assert mask[i, j] == active[i // block[0], j // block[1]]
    expected = torch.where(mask, weight, torch.zeros(()))
    before = weight.clone()
    assert torch.equal(pattern.apply(weight), expected)
    assert torch.equal(weight, before)
    assert pattern.apply_(weight) is weight
    assert torch.equal(weight, expected)


def test_zeros_are_exact_whatever_was_there():
    pattern = Pattern(torch.tensor([[True, False, False, False]]), (1, 2))
    garbage = torch.tensor([[1.0, 2, float("nan"), float("inf"), -0.0, -3, -float("inf"), 5]])
    for result in (pattern.apply(garbage), pattern.apply_(garbage.clone())):
        assert result.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
        assert not torch.signbit(result).any()


def test_what_is_no_pattern():
    with pytest.raises(TypeError, match="2-D bool tensor"):
        Pattern(torch.ones(2, 2))
    with pytest.raises(TypeError, match="2-D bool tensor"):
        Pattern(torch.ones(4, dtype=torch.bool))
    pattern = Pattern(torch.ones(2, 2, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        pattern.apply(torch.zeros(4, 6))
    with pytest.raises(ValueError, match="does not fit"):
        pattern.apply_(torch.zeros(2, 8))
