"""Scores of blocks: the same integers however a layer is cut, and right ones."""

import struct
import warnings
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_gpt.topology import block_scores as module
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.keys import NonFiniteScores
from tests.topology.exchange import Rank, on_ranks, outcomes

BLOCKS = [(1, 1), (2, 4), (3, 5), (4, 1), (1, 7), (16, 16)]
SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)
POOLS = [
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0]),
    st.sampled_from([0.0, SMALLEST, -SMALLEST, 3 * SMALLEST, 2.0**-127]),
    st.sampled_from([LARGEST, -LARGEST, 3e38, 1.0, SMALLEST]),
    st.sampled_from([1.0, -1.0, 2.0**-30, 1 + 2.0**-23, 2.0**-31, 3 * 2.0**-32]),
]


@st.composite
def weights(draw, blocks=tuple(BLOCKS), most: int = 3) -> tuple[Tensor, tuple[int, int]]:
    """A `[out, in]` weight of one block to `most` x `most` of them."""
    block = draw(st.sampled_from(blocks))
    rows, columns = (size * draw(st.integers(1, most)) for size in block)
    values = draw(st.lists(draw(st.sampled_from(POOLS)), min_size=rows * columns,
                           max_size=rows * columns))  # fmt: skip
    return torch.tensor(values).view(rows, columns), block


def score_layers(
    layers: list[Tensor],
    block: tuple[int, int],
    score: str,
    edges: list[list[int]],
    common_scale: bool = False,
) -> list[list[int]]:
    """Scores of every layer, checked to be the same on every rank; `edges` cut each layer."""

    def body(rank: Rank) -> list[list[int]]:
        parts = []
        for layer, cuts in zip(layers, edges, strict=True):
            start, stop = list(pairwise(cuts))[rank.index]
            part = (start, layer.reshape(-1)[start:stop])
            parts.append(part if stop > start or start % 2 else None)
        shapes = [(layer.shape[0], layer.shape[1]) for layer in layers]
        scores = block_scores(
            parts, shapes, block, score, rank.sum, rank.max, torch.device("cpu"), common_scale
        )
        assert all(tensor.dtype == torch.int64 and tensor.dim() == 1 for tensor in scores)
        assert len(rank.sent) == 2, "two exchanges, however many layers"
        return [tensor.tolist() for tensor in scores]

    ended = on_ranks(len(edges[0]) - 1, body)
    assert all(scores == ended[0] for scores in ended)
    return ended[0]


def alone(layers, block, score="l2", common_scale=False) -> list[list[int]]:
    edges = [[0, layer.numel()] for layer in layers]
    return score_layers(layers, block, score, edges, common_scale)


def blocks_of(weight: Tensor, block: tuple[int, int]) -> list[list[float]]:
    """The elements of every block, row-major in the grid."""
    rows, columns = weight.shape[0] // block[0], weight.shape[1] // block[1]
    exact = weight.double()
    return [
        [
            exact[i * block[0] + a, j * block[1] + b].item()
            for a in range(block[0])
            for b in range(block[1])
        ]
        for i in range(rows)
        for j in range(columns)
    ]


def unit(largest: float, block: tuple[int, int]) -> Fraction:
    """2^-62 of a bound, a power of two, of what squares of a block can sum to."""
    if largest == 0:
        return Fraction(1)
    above = Fraction(2) ** 200
    while above / 2 > Fraction(largest):
        above /= 2
    most = 1
    while most < block[0] * block[1]:
        most *= 2
    return most * above**2 / 2**62


def exact_scores(weight: Tensor, block: tuple[int, int], one: Fraction) -> list[int]:
    """Every square rounded, half to even, to a number of units."""
    return [
        sum(round(Fraction(x) ** 2 / one) for x in elements)
        for elements in blocks_of(weight, block)
    ]


@settings(max_examples=100, deadline=None)
@given(weights())
def test_squared_norms_in_exact_arithmetic(case):
    weight, block = case
    largest = weight.abs().max().item()
    wanted = exact_scores(weight, block, unit(largest, block))
    assert alone([weight], block) == [wanted]
    assert all(0 <= score <= 2**62 for score in wanted), "int64 holds sums of them"
    if largest:
        assert max(wanted) >= 2**60 // (2 * block[0] * block[1]), "no bits are wasted"


@settings(max_examples=40, deadline=None)
@given(weights())
def test_the_largest_magnitude_of_a_block(case):
    weight, block = case
    wanted = [max(map(abs, elements)) for elements in blocks_of(weight, block)]
    (got,) = alone([weight], block, "max")
    assert [struct.unpack("f", struct.pack("I", score))[0] for score in got] == wanted


def test_maxima_do_not_warn():
    """Not even once a process."""
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alone([torch.ones(2, 4)], (2, 4), "max")
    finally:
        torch.set_warn_always(False)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(["l2", "max"]), st.booleans(), st.sampled_from([1, 16, 1 << 17]))
def test_the_same_for_every_split(data, score, common_scale, chunk):
    """Any boundaries: within a row, a block; empty parts; few rows at once."""
    block = data.draw(st.sampled_from(BLOCKS))
    layers = [data.draw(weights((block,)))[0] for _ in range(data.draw(st.integers(1, 3)))]
    ranks = data.draw(st.integers(1, 5))
    edges = []
    for layer in layers:
        inner = st.lists(st.integers(0, layer.numel()), min_size=ranks - 1, max_size=ranks - 1)
        edges.append([0, *sorted(data.draw(inner)), layer.numel()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_size", lambda device: chunk)
        together = score_layers(layers, block, score, edges, common_scale)
    assert together == alone(layers, block, score, common_scale)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_layers_on_one_scale(data):
    """Compared across layers: units of the largest of all; else each layer has its own."""
    block = data.draw(st.sampled_from([(2, 4), (3, 5)]))
    layers = [data.draw(weights((block,), most=2))[0] for _ in range(3)]
    tops = [layer.abs().max().item() for layer in layers]
    one = unit(max(tops), block)
    assert alone(layers, block, common_scale=True) == [
        exact_scores(layer, block, one) for layer in layers
    ]
    assert alone(layers, block) == [
        exact_scores(layer, block, unit(top, block)) for layer, top in zip(layers, tops)
    ]


def test_a_small_example():
    weight = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    (got,) = alone([weight], (2, 2))
    assert got == [25 * 2**54, 2 * 2**54]  # 4 < 2^3; four squares below 2^6 each, sum below 2^62
    (got,) = alone([weight], (1, 2), "max")
    assert got == [0x40800000, 0, 0, 0x3F800000]


def test_close_norms_are_told_apart():
    """As near as fp32 numbers are; fp32 sums of squares would not see it."""
    weight = torch.ones(2, 8)
    weight[1, 3] = 1 + 2.0**-23
    (got,) = alone([weight], (1, 8))
    assert got[1] > got[0]


@settings(max_examples=30, deadline=None)
@given(weights(((2, 4), (3, 5)), most=2))
def test_bf16_counts_as_it_is(case):
    weight, block = case
    low = weight.bfloat16()
    low[~low.isfinite()] = 1.0
    for score in ("l2", "max"):
        assert alone([low], block, score) == alone([low.float()], block, score)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("score", ["l2", "max"])
def test_what_is_not_finite_on_one_rank_is_refused_on_every_rank(bad, score):
    good, broken = torch.rand(4, 8), torch.rand(4, 8)
    broken[3, 7] = bad

    def body(rank: Rank):
        parts = [(16 * rank.index, w.view(-1)[16 * rank.index :][:16]) for w in (good, broken)]
        device = torch.device("cpu")
        block_scores(parts, [(4, 8)] * 2, (2, 4), score, rank.sum, rank.max, device)

    errors = [error for _, error in outcomes(2, body)]
    assert [type(error) for error in errors] == [NonFiniteScores] * 2
    assert all("not finite" in str(error) for error in errors)


def test_what_is_given_is_left_alone():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    for score in ("l2", "max"):
        alone([weight], (3, 5), score)
    assert torch.equal(weight, before)


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["l2", "max"])
def test_the_same_on_a_gpu(score):
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    for block in ((16, 16), (3, 5)):
        got = [
            block_scores(
                [(0, weight.view(-1).to(device))],
                [(96, 160)],
                block,
                score,
                lambda values: values,
                lambda values: values,
                torch.device(device),
            )[0].cpu()
            for device in ("cpu", "cuda")
        ]
        assert torch.equal(*got)
