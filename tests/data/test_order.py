"""The order of samples is a bijection, exact in its shares, and a pure function."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.order import SampleOrder, block_counts, derive_key, permute, permute_array
from sparse_gpt.errors import UserError

KEYS = st.integers(0, 2**64 - 1)
GOLDEN_PERMUTATION = [1, 2, 9, 4, 5, 6, 3, 8, 7, 0]
GOLDEN_KEY = 1152307757846250571


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=KEYS)
def test_permutation_is_a_bijection(n, key):
    image = permute_array(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_scalar_and_array_forms_agree(n, key, data):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    image = permute_array(np.array(index), n, key)
    assert image.dtype == np.int64
    assert image.tolist() == [permute(i, n, key) for i in index]
    assert all(0 <= value < n for value in image.tolist())


def test_golden_values_hold_on_every_machine():
    # Written down once: a change here silently reorders every resumed run.
    assert [permute(i, 10, 12345) for i in range(10)] == GOLDEN_PERMUTATION
    assert derive_key("epoch", 7, 0, 3) == GOLDEN_KEY


def test_permutation_looks_random():
    n = 10_000
    image = permute_array(np.arange(n), n, derive_key("x", 1))
    fixed = int((image == np.arange(n)).sum())
    assert fixed < 10  # Poisson(1)
    correlation = np.corrcoef(np.arange(n), image)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)
    neighbours = np.abs(np.diff(image))
    assert 0.9 < neighbours.mean() / (n / 3) < 1.1


def test_indices_outside_are_refused():
    with pytest.raises(IndexError):
        permute(5, 5, 0)
    with pytest.raises(IndexError):
        permute_array(np.array([-1]), 5, 0)
    with pytest.raises(IndexError):
        SampleOrder(0, [3], [1.0]).locate(-1)


def test_one_source_walks_epochs():
    n = 17
    order = SampleOrder(3, [n], [2.5])
    for epoch in range(4):
        items = [order.locate(epoch * n + i) for i in range(n)]
        assert [source for source, _ in items] == [0] * n
        assert sorted(item for _, item in items) == list(range(n))
        key = derive_key("epoch", 3, 0, epoch)
        assert [item for _, item in items] == [permute(i, n, key) for i in range(n)]
    first, second = ([order.locate(e * n + i) for i in range(n)] for e in (0, 1))
    assert first != second


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    sizes=st.lists(st.integers(1, 400), min_size=5, max_size=5),
    seed=st.integers(-(2**63), 2**63),
)
def test_mixture_counts_are_exact_over_blocks(weights, sizes, seed):
    order = SampleOrder(seed, sizes[: len(weights)], weights)
    counts = block_counts(weights)
    assert sum(counts) == order.block
    share = [w / sum(weights) * order.block for w in weights]
    assert all(abs(c - s) < 1 + 1e-6 for c, s in zip(counts, share))
    seen = np.zeros(len(weights), dtype=np.int64)
    walked = [[] for _ in weights]
    for i in range(min(2 * order.block, 2000)):
        assert order.consumed(i) == seen.tolist()
        source, item = order.locate(i)
        walked[source].append(item)
        seen[source] += 1
    for source, items in enumerate(walked):
        n = sizes[source]
        for start in range(0, len(items) - n + 1, n):
            assert sorted(items[start : start + n]) == list(range(n))
    for blocks in (1, 5, 10**9):
        assert order.consumed(blocks * order.block) == [blocks * c for c in counts]


def test_locate_is_pure():
    order = SampleOrder(11, [50, 70], [1, 3])
    far = [order.locate(i) for i in (0, 10**12, 3, 999_999, 3)]
    fresh = [SampleOrder(11, [50, 70], [1, 3]).locate(i) for i in (0, 10**12, 3, 999_999, 3)]
    assert far == fresh
    other = [SampleOrder(12, [50, 70], [1, 3]).locate(i) for i in range(100)]
    assert other != [order.locate(i) for i in range(100)]


def test_small_weights_lengthen_the_block():
    assert sum(block_counts([1.0, 0.00015])) == 10_000
    with pytest.raises(UserError, match="less than one sample"):
        block_counts([1.0, 1e-9])


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_bad_weights_are_refused(weight):
    with pytest.raises(UserError, match="weight of source 1"):
        SampleOrder(0, [5, 5], [1.0, weight])


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="at least one source"):
        SampleOrder(0, [], [])
    with pytest.raises(UserError, match="source 0 has no items"):
        SampleOrder(0, [0], [1.0])
    with pytest.raises(UserError, match="2 sources but 1 weights"):
        SampleOrder(0, [1, 2], [1.0])
