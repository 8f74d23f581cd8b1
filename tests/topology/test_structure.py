"""Block scores and top-k selection, against plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology.structure import BlockStructure, top_units

FEW = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 1e-40, 3e38])  # ties, subnormal, near the end


@st.composite
def matrices(draw, elements=FEW, multiple=(1, 1)):
    rows = draw(st.integers(1, 5)) * multiple[0]
    cols = draw(st.integers(1, 5)) * multiple[1]
    values = draw(st.lists(elements, min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(values, dtype=torch.float32).view(rows, cols)


@given(matrices(), st.data())
def test_top_units_keeps_the_largest_and_the_first_among_equals(scores, data):
    count = data.draw(st.integers(0, scores.numel()))
    flat = scores.reshape(-1).tolist()
    wanted = set(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count])
    mask = top_units(scores, count)
    assert mask.shape == scores.shape
    assert set(mask.reshape(-1).nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("count", [-1, 7])
def test_top_units_refuses_a_count_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"cannot keep {count} of 6"):
        top_units(torch.zeros(2, 3), count)


@given(matrices(st.floats(-1e3, 1e3, width=32), multiple=(2, 3)), st.sampled_from(["l2", "max"]))
def test_block_scores(values, score):
    structure = BlockStructure((2, 3), score)
    got = structure.scores(values)
    rows, cols = structure.grid(tuple(values.shape))
    assert (rows, cols) == (values.shape[0] // 2, values.shape[1] // 3) == tuple(got.shape)
    for i in range(rows):
        for j in range(cols):
            block = [values[2 * i + a, 3 * j + b].item() for a in range(2) for b in range(3)]
            if score == "max":
                assert got[i, j].item() == max(map(abs, block))
            else:
                assert got[i, j].item() == pytest.approx(math.hypot(*block), rel=1e-5, abs=1e-18)


@given(matrices())
def test_single_weights_score_their_exact_magnitude(values):
    assert torch.equal(BlockStructure().scores(values), values.abs())
    assert torch.equal(BlockStructure().scores(values.to(torch.bfloat16)),
                       values.to(torch.bfloat16).float().abs())  # fmt: skip


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide"):
        BlockStructure((4, 4)).grid((8, 6))


def test_scores_keep_zero_apart_from_the_smallest_number():
    values = torch.tensor([[0.0, 1e-45]])
    assert top_units(BlockStructure().scores(values), 1).tolist() == [[False, True]]
