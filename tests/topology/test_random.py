"""Random scores: a function of (seed, update, layer, position), uniform enough to choose by.

All bounds on distributions are on fixed scores: they pass always or never.
"""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology.random import RandomKey, random_scores

MASK = 2**32 - 1


def oracle(seed, update, layer, position):
    """In Python's own integers: two rounds of xor, multiply and shift, keyed in between."""
    digest = hashlib.sha256(f"{seed}/{update}/{layer}".encode()).digest()
    low, high = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    x = ((position ^ low) * 0x7FEB352D) & MASK
    x ^= x >> 15
    x = ((x ^ high) * 0x846CA68B) & MASK
    x ^= x >> 16
    return x & 0x7FFFFFFF


@pytest.mark.parametrize(
    ("key", "start", "scores"),
    [
        ((0, 0, "sample"), 0, [1362511698, 505799949, 467413730]),
        ((1234, 7, "h.3.mlp.fc1.weight"), 0, [656587369, 826163048, 853713022]),
        ((1234, 7, "h.3.mlp.fc1.weight"), 1_000_000, [852063583, 1801787249, 637699045]),
        ((2**40, 0, "h.0.attn.q.weight"), 2**31 - 2, [669713690, 953266474, 2118943274]),
    ],
)
def test_golden_values(key, start, scores):
    """Pinned: other values would change every run that is resumed."""
    assert random_scores(*key, start, len(scores)).tolist() == scores


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 2**32))
def test_against_the_oracle(seed, update, layer, start):
    got = random_scores(seed, update, layer, start, 5)
    assert got.dtype == torch.int32
    assert got.tolist() == [oracle(seed, update, layer, (start + i) % 2**32) for i in range(5)]


@given(st.integers(0, 400), st.integers(0, 400))
def test_parts_are_those_of_the_whole(a, b):
    start, end = min(a, b), max(a, b)
    key = RandomKey.of(3, 1, "h.0.attn.q.weight")
    everything = key.range(0, 400)
    assert torch.equal(everything[start:end], key.range(start, end))
    assert torch.equal(
        everything[start:end], random_scores(3, 1, "h.0.attn.q.weight", start, end - start)
    )
    some = torch.tensor([b % 400, a % 400])
    for dtype in (torch.int32, torch.int64):
        asked = some.to(dtype)
        assert torch.equal(key.scores(asked), everything[some])
        assert torch.equal(asked, some.to(dtype)), "the positions are left alone"


def test_the_end_of_32_bits_is_no_seam():
    key = RandomKey.of(1, 1, "layer")
    around = [key.range(2**31 - 3, 2**31 + k).tolist() for k in (-1, 0, 5)]
    assert around[2][:2] == around[0] and around[2][:3] == around[1]


def test_the_global_generator_is_neither_used_nor_moved():
    before = torch.get_rng_state()
    first = random_scores(1, 2, "layer", 0, 100)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(random_scores(1, 2, "layer", 0, 100), first)
    torch.set_rng_state(before)


@pytest.mark.parametrize("other", [(2, 0, "a"), (1, 1, "a"), (1, 0, "b"), (0, 1, "a"), (11, 0, "")])
def test_every_part_of_the_key_counts(other):
    """Scores of other keys are independent of these, position by position and in order."""
    n = 1 << 15
    mine, theirs = random_scores(1, 0, "a", 0, n), random_scores(*other, 0, n)
    assert int((mine == theirs).sum()) <= 1
    assert abs(correlation(mine, theirs)) < 4 / n**0.5
    # The choices they lead to overlap as by chance: a quarter of a quarter.
    quarter = 1 << 29
    both = int(((mine < quarter) & (theirs < quarter)).sum())
    assert abs(both - n / 16) < 4 * (n / 16) ** 0.5
    assert RandomKey.of(1, 0, "a") != RandomKey.of(*other)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


def chi_square(values: torch.Tensor, bins: int) -> float:
    """Standard deviations from what is expected of uniform values in `[0, bins)`."""
    counts = torch.bincount(values.long(), minlength=bins).double()
    assert counts.numel() == bins
    expected = values.numel() / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / (2 * (bins - 1)) ** 0.5


KEYS = [(7, 3, "h.5.mlp.fc1.weight"), (7, 4, "h.5.mlp.fc1.weight"), (0, 0, "a")]


@pytest.mark.parametrize("start", [0, 12_345_679])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_scores_are_uniform(key, start):
    n = 1 << 17
    scores = random_scores(*key, start, n)
    assert int(scores.min()) >= 0
    assert abs(chi_square(scores >> 23, 256)) < 4, "high bits"
    assert abs(chi_square(scores & 255, 256)) < 4, "low bits"
    bits = torch.stack([(scores >> bit) & 1 for bit in range(31)]).double().mean(1)
    assert ((bits - 0.5).abs() < 5 * 0.5 / n**0.5).all()
    # As many equal ones as 2^31 values give by chance: n^2 / 2^32 pairs, here 4.
    assert n - scores.unique().numel() <= 14


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("step", [1, 2, 3, 768, 2048])
def test_neighbours_are_independent(key, step):
    """Along a row and down a column of a weight: pairs fill a 16 x 16 grid evenly."""
    n = 1 << 17
    scores = random_scores(*key, 0, n + step)
    first, second = scores[:n], scores[step:]
    assert abs(correlation(first, second)) < 4 / n**0.5
    assert abs(chi_square((first >> 27) * 16 + (second >> 27), 256)) < 4


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_rows_and_columns_get_their_share(key):
    """The highest quarter of a 512 x 512 layer: binomial counts in rows and in columns."""
    scores = random_scores(*key, 0, 512 * 512).view(512, 512)
    chosen = (scores >= 3 << 29).double()
    for dim in (0, 1):
        counts = chosen.sum(dim)
        spread = float(((counts - 128) ** 2).mean()) / (512 * 0.25 * 0.75)
        assert abs(spread - 1) < 4 * (2 / 512) ** 0.5
        assert float((counts - 128).abs().max()) < 5 * (512 * 0.25 * 0.75) ** 0.5


def test_it_does_not_warn_of_overflow():
    with np.errstate(all="raise"):
        random_scores(1, 2, "x", 2**32 - 10, 20)
        RandomKey(-1, -(2**31)).range(0, 10)


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    for start in (5, 2**31 - 10):
        assert torch.equal(random_scores(1, 2, "x", start, 1000, "cuda").cpu(),
                           random_scores(1, 2, "x", start, 1000))  # fmt: skip
