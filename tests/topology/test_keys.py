"""Keys are ordered as the scores they stand for, exactly."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import LargestMagnitude, Random, SmallestMagnitude
from sparse_gpt.topology.random import RandomKey, random_scores

TOP = 2**31 - 1
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)
EDGES = [0.0, -0.0, SMALLEST, -SMALLEST, 2 * SMALLEST, 2.0**-126, 1.0, -1.0, LARGEST, -LARGEST]


def source(of, values, dtype=torch.float32):
    tensor = torch.tensor(values, dtype=dtype)
    return of(tensor, ~Bits.empty(len(values)), 0, len(values))


def keys_of(of, values, dtype=torch.float32):
    made = source(of, values, dtype)
    keys = made.keys(0, len(values))
    assert keys.dtype == torch.int32
    order = torch.arange(len(values)).flip(0)
    assert torch.equal(made.keys_at(order), keys[order])
    assert torch.equal(made.keys(1, len(values)), keys[1:])
    assert made.values.tolist() == torch.tensor(values, dtype=dtype).tolist(), "left alone"
    return keys.tolist()


def assert_ordered(values, keys, larger_first):
    for value, key in zip(values, keys):
        assert 0 <= key <= TOP
        for other, its_key in zip(values, keys):
            wins = abs(value) > abs(other) if larger_first else abs(value) < abs(other)
            assert wins == (key > its_key), (value, other)
            assert (abs(value) == abs(other)) == (key == its_key)


@given(st.lists(FINITE | st.sampled_from(EDGES), min_size=1, max_size=12))
@example(EDGES)
def test_magnitudes(values):
    assert_ordered(values, keys_of(LargestMagnitude, values), larger_first=True)
    assert_ordered(values, keys_of(SmallestMagnitude, values), larger_first=False)


@given(st.lists(FINITE | st.sampled_from(EDGES), min_size=1, max_size=12))
def test_lower_precision_is_compared_as_it_is(values):
    for dtype in (torch.bfloat16, torch.float16):
        held = torch.tensor(values, dtype=dtype)
        if held.isfinite().all():
            exact = held.double().tolist()
            assert_ordered(exact, keys_of(LargestMagnitude, values, dtype), larger_first=True)
            assert_ordered(exact, keys_of(SmallestMagnitude, values, dtype), larger_first=False)


@pytest.mark.parametrize("of", [LargestMagnitude, SmallestMagnitude])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(of, bad):
    assert bool(source(of, EDGES).is_finite(source(of, EDGES).keys(0, len(EDGES))))
    for place in range(3):
        values = [0.0, LARGEST, SMALLEST]
        values[place] = bad
        made = source(of, values)
        assert not bool(made.is_finite(made.keys(0, 3)))


@given(st.integers(0, 2**33), st.integers(1, 30))
def test_random_keys_are_the_layers_scores(start, numel):
    made = Random(RandomKey.of(5, 2, "x"), ~Bits.empty(numel), start, start + numel)
    wanted = random_scores(5, 2, "x", start, numel)
    assert torch.equal(made.keys(0, numel), wanted)
    assert torch.equal(made.keys(numel // 2, numel), wanted[numel // 2 :])
    order = torch.arange(numel).flip(0)
    assert torch.equal(made.keys_at(order), wanted[order])
    assert made.is_finite(wanted) is None


def test_what_a_source_knows():
    for of in (partial(LargestMagnitude, torch.zeros(10)), partial(Random, RandomKey(1, 2))):
        made = of(Bits.empty(10), 7, 40, base=100)
        assert (made.numel, made.start, made.total, made.base) == (10, 7, 40, 100)
        assert made.device == torch.device("cpu")
    assert Random.uniform and not LargestMagnitude.uniform and not SmallestMagnitude.uniform
