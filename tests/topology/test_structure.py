"""The grid of units of a weight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology.structure import BlockStructure

SIZES = st.integers(1, 50)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_grid_of_whole_blocks(rows, columns, out_size, in_size):
    structure = BlockStructure((out_size, in_size))
    assert structure.grid((rows * out_size, columns * in_size)) == (rows, columns)
    assert structure.unstructured == (out_size == in_size == 1)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (2, 4), (9, 9)])
def test_a_block_that_does_not_divide_is_refused(shape):
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) do not divide a weight of \("):
        BlockStructure((4, 4)).grid(shape)


def test_by_default_single_weights_by_their_norm():
    assert BlockStructure().unstructured and BlockStructure().score == "l2"
