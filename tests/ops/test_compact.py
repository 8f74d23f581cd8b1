"""Compact storage: the layout's views, and its reference kernel against the masked one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.ops import COMPACT, KERNELS, BlockLayout, Growth, Operand, Pattern

REFERENCE = COMPACT["reference"]


def layout_of(active: torch.Tensor, block: tuple[int, int], seed: int = 0) -> BlockLayout:
    """A layout of some blocks, whose slots are in random order."""
    canonical = active.flatten().nonzero().view(-1)
    order = torch.randperm(canonical.numel(), generator=torch.Generator().manual_seed(seed))
    shape = (active.shape[0] * block[0], active.shape[1] * block[1])
    return BlockLayout(shape, block, canonical[order])


def random_active(rows: int, columns: int, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_views_name_every_block_in_order(rows, columns, share, seed):
    active = random_active(rows, columns, share, seed)
    layout = layout_of(active, (2, 3), seed)
    slots = layout.slots.tolist()
    for order, pointers, minors, by_row in (
        (layout.row_slot, layout.row_ptr, layout.col_idx, True),
        (layout.col_slot, layout.col_ptr, layout.row_idx, False),
    ):
        found = []
        for major in range(pointers.numel() - 1):
            for entry in range(int(pointers[major]), int(pointers[major + 1])):
                row, column = (major, int(minors[entry])) if by_row else (int(minors[entry]), major)
                assert slots[int(order[entry])] == row * columns + column
                found.append((row, column) if by_row else (column, row))
        assert found == sorted(found)
        assert len(found) == int(active.sum()) == len(set(found))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.booleans(), st.integers(0, 10**6)
)
def test_bands_hold_the_entries_of_their_columns_row_by_row(rows, columns, band, transposed, seed):
    active = random_active(rows, columns, 0.6, seed)
    layout = layout_of(active, (2, 3), seed)
    pointers, minors, slots = layout.view(transposed, band)
    grid = active.t() if transposed else active
    entry = 0
    for first in range(0, grid.shape[1], band):
        for row in range(grid.shape[0]):
            assert int(pointers[first // band * grid.shape[0] + row]) == entry
            for column in range(first, min(first + band, grid.shape[1])):
                if grid[row, column]:
                    assert int(minors[entry]) == column
                    place = (column, row) if transposed else (row, column)
                    assert int(layout.slots[slots[entry]]) == place[0] * columns + place[1]
                    entry += 1
    assert entry == layout.count == int(pointers[-1])


def test_gather_undoes_scatter_and_nothing_lies_outside():
    active = random_active(5, 7, 0.4)
    layout = layout_of(active, (4, 2))
    values = torch.randn(layout.count, 4, 2)
    weight = layout.scatter(values)
    assert torch.equal(layout.gather(weight), values)
    outside = ~Pattern(active, (4, 2)).expand()
    assert torch.equal(weight[outside], torch.zeros(int(outside.sum())))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 8)])
def test_reference_has_the_bits_of_the_masked_kernel(block, dtype, activation):
    from sparse_gpt.ops import ACTIVATIONS

    shape = (24, 16)
    active = random_active(shape[0] // block[0], shape[1] // block[1], 0.5)
    layout, pattern = layout_of(active, block), Pattern(active, block)
    x, bias = torch.randn(3, 5, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    weight = pattern.apply(torch.randn(shape, dtype=dtype))
    dense, dy = [], torch.randn(3, 5, 24, dtype=dtype)

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = KERNELS["masked"](*leaves, pattern, "dense")
    expected = y if activation is None else ACTIVATIONS[activation](y)
    expected.backward(dy)
    mine = [t.clone().requires_grad_() for t in (x, layout.gather(weight), bias)]
    growth = Growth("dense", lambda gradient: dense.append(gradient.clone()))
    (got,) = REFERENCE(mine[0], [Operand(mine[1], mine[2], layout, growth)], activation)
    got.backward(dy)

    assert torch.equal(got, expected)
    assert torch.equal(mine[0].grad, leaves[0].grad)
    assert torch.equal(mine[1].grad, layout.gather(leaves[1].grad))
    assert torch.equal(mine[2].grad, leaves[2].grad)
    assert torch.equal(dense[0], leaves[1].grad)


def test_rewriting_keeps_addresses_and_is_noticed_by_a_backward_pass():
    layout = BlockLayout((8, 8), (2, 2), torch.tensor([0, 5, 10]))
    address = layout.slots.data_ptr(), layout.row_slot.data_ptr(), layout.col_idx.data_ptr()
    values = torch.randn(3, 2, 2, requires_grad=True)
    (y,) = REFERENCE(torch.randn(4, 8), [Operand(values, None, layout)], None)
    layout.rewrite(torch.tensor([0, 15, 10]))
    assert address == (
        layout.slots.data_ptr(),
        layout.row_slot.data_ptr(),
        layout.col_idx.data_ptr(),
    )
    with pytest.raises(RuntimeError, match="topology changed between"):
        y.sum().backward()


@pytest.mark.parametrize("slots", [[0, 0], [0, 16], [-1, 3], [0, 1, 2]])
def test_slots_that_are_no_topology_are_refused(slots):
    layout = BlockLayout((8, 8), (2, 2), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"block"):
        layout.rewrite(torch.tensor(slots))


@pytest.mark.parametrize("kernel", [name for name in COMPACT if name != "reference"])
def test_what_does_not_fit_a_layout_is_refused(kernel):
    layout, x = BlockLayout((8, 8), (2, 2), torch.tensor([0, 5])), torch.zeros(3, 8)
    values, bias = torch.zeros(2, 2, 2), torch.zeros(8)
    for bad, error in (
        ((x, [Operand(values[:1], bias, layout)]), "1 blocks|values of"),
        ((x, [Operand(values, bias[:4], layout)]), "a bias of"),
        ((x[:, :4], [Operand(values, bias, layout)]), "x of"),
        ((x, []), "no weight"),
        ((x, [Operand(values, bias, layout)], "relu"), "no activation"),
    ):
        with pytest.raises(ValueError, match=error):
            COMPACT[kernel](*bad)
    with pytest.raises(TypeError, match="several dtypes"):
        COMPACT[kernel](x, [Operand(values.double(), bias, layout)])
