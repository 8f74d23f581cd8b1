"""What a mask does to tensors, against a dense boolean mask."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_gpt.topology import bits, passes
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.masks import LayerMask, SavedLayer

BLOCKS = [(1, 1), (2, 4), (3, 5), (1, 7), (4, 1)]
CHUNKS = st.sampled_from([8, 24, 1 << 17])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
POOL = [0.0, -0.0, 1.0, -2.5, 1e-40, float("nan"), -float("nan"), float("inf"), -float("inf")]


def dense(active: Tensor, block: tuple[int, int]) -> Tensor:
    """bool `[out, in]` of a grid of blocks."""
    out = torch.zeros(active.shape[0] * block[0], active.shape[1] * block[1], dtype=torch.bool)
    for i, j in active.nonzero().tolist():
        out[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = True
    return out


@st.composite
def masks(draw) -> tuple[LayerMask, Tensor, int, int]:
    """A mask, the same as dense bools (flattened), and the range `[start, stop)` a rank holds.

    The mask of single weights holds bits of that range only; that of blocks holds all.
    """
    block = draw(st.sampled_from(BLOCKS))
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    flags = draw(st.lists(st.booleans(), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1]))
    active = torch.tensor(flags).view(grid)
    inside = dense(active, block).reshape(-1)
    start, stop = sorted(draw(st.tuples(*[st.integers(0, inside.numel())] * 2)))
    shape = grid[0] * block[0], grid[1] * block[1]
    if block == (1, 1):
        mask = LayerMask(shape, block, Bits.of(inside[start:stop]), start, sum(flags))
    else:
        mask = LayerMask(shape, block, Bits.of(active), 0, sum(flags))
    return mask, inside, start, stop


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(masks())
def test_what_a_mask_knows(case):
    mask, inside, _, _ = case
    assert mask.units * mask.block_size == inside.numel() == mask.shape[0] * mask.shape[1]
    assert mask.grid[0] * mask.grid[1] == mask.units
    assert mask.sharded == (mask.block == (1, 1))
    assert mask.active * mask.block_size == int(inside.sum())
    assert mask.on(torch.device("cpu")) is mask


@settings(max_examples=150, deadline=None)
@given(masks(), st.data())
def test_flags(case, data):
    """Of any range for blocks; of ranges that start at a byte of the held bits for weights."""
    mask, inside, start, stop = case
    assert mask.flags(start, stop).tolist() == inside[start:stop].int().tolist()
    if mask.sharded:
        first = start + 8 * data.draw(st.integers(0, (stop - start) // 8))
        last = data.draw(st.integers(first, stop))
    else:
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, inside.numel())] * 2)))
    got = mask.flags(first, last)
    assert got.dtype == torch.uint8
    assert got.tolist() == inside[first:last].int().tolist()


@settings(max_examples=200, deadline=None)
@given(masks(), st.sampled_from(DTYPES), st.integers(0, 2**32), CHUNKS, st.booleans())
def test_zero_outside(case, dtype, seed, chunk, native):
    """Bit by bit: what is inside stays, NaN and -0 too; what is outside becomes +0."""
    mask, inside, start, stop = case
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(POOL), (inside.numel(),), generator=generator)
    everything = torch.tensor(POOL, dtype=torch.float64)[drawn].to(dtype)
    wanted = everything.clone()
    wanted[start:stop][~inside[start:stop]] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "chunk_size", lambda device: chunk)
        if not native:
            patch.setattr(passes, "native_passes", lambda: None)
        mask.zero_outside_(everything[start:stop], start)
    assert same_bits(everything, wanted)


@given(masks(), st.permutations(DTYPES))
def test_zero_outside_of_several_at_once(case, dtypes):
    """A weight and its moments, whatever their precision."""
    mask, inside, start, stop = case
    several = [torch.ones(stop - start, dtype=dtype) for dtype in dtypes]
    mask.zero_outside_(several, start)
    for values, dtype in zip(several, dtypes, strict=True):
        assert values.dtype == dtype
        assert torch.equal(values, inside[start:stop].to(dtype))


@settings(max_examples=100, deadline=None)
@given(masks(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32), CHUNKS)
def test_square_sum(case, dtype, seed, chunk):
    mask, inside, start, stop = case
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(stop - start, generator=generator).to(dtype)
    values[~inside[start:stop]] = float("nan")
    before = values.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "chunk_size", lambda device: chunk)
        got = mask.square_sum(values, start)
    assert got.dtype == torch.float64 and got.shape == ()
    exact = (values[inside[start:stop]].double() ** 2).sum().item()
    assert got.item() == pytest.approx(exact, rel=1e-5, abs=0)
    assert same_bits(values, before), "the values are left alone"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_square_sum_tells_what_is_not_finite_inside(bad):
    mask = LayerMask((1, 3), (1, 1), Bits.of(torch.tensor([True, True, False])), 0, 2)
    assert not mask.square_sum(torch.tensor([1.0, bad, 0.0]), 0).isfinite()


def test_a_layer_of_which_a_rank_holds_nothing():
    mask = LayerMask((4, 8), (1, 1), Bits.empty(0), 0, 7)
    nothing = torch.zeros(0)
    mask.zero_outside_(nothing, 0)
    assert mask.square_sum(nothing, 0).item() == 0
    assert mask.units == 32


def test_a_saved_layer_counts_weights():
    layer = SavedLayer(grid=(3, 5), block=(2, 4), active=7)
    assert (layer.weights, layer.active_weights) == (120, 56)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_a_gpu(block, dtype):
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(30, 20, generator=generator) < 0.3
    mask = LayerMask((30 * block[0], 20 * block[1]), block, Bits.of(active), 0, int(active.sum()))
    values = torch.randn(mask.units * mask.block_size, generator=generator).to(dtype)
    values[::7] = float("nan")
    start = 0 if block == (1, 1) else 17
    here, there = values[start:].clone(), values[start:].cuda()
    mask.zero_outside_(here, start)
    replace(mask).zero_outside_(there, start)
    assert same_bits(here, there.cpu())
