"""The passes in C++ against those in numpy, which are their specification: the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology import passes
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import LargestMagnitude, Random, SmallestMagnitude, Source
from sparse_gpt.topology.passes import TOP, Bracket, Part
from sparse_gpt.topology.random import RandomKey

KINDS = [LargestMagnitude, SmallestMagnitude, Random]
BINS = 64


@pytest.fixture(autouse=True)
def compiler():
    if passes.native_passes() is None:
        pytest.skip("needs a C++ compiler")


def drawn(kind: type[Source], numel: int, seed: int, ties: bool) -> Source:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    if ties:
        values = values.round()
    candidates = Bits.of(torch.rand(numel, generator=generator) < 0.5)
    start = seed % 1000
    place = (candidates, start, start + numel + 7, seed % 5)
    if kind is Random:
        return Random(RandomKey.of(seed, 1, "x"), *place)
    return kind(values, *place)


def both(work):
    """What `work` returns with the passes in C++, and without them."""
    native = work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "native_passes", lambda: None)
        return native, work()


def assert_same(native, plain):
    for mine, theirs in zip(native, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


SIZES = st.sampled_from([1, 7, 8, 63, 64, 65, 511, 512, 513, 1025, 5000])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS), SIZES, st.integers(0, 10**6), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([0, 3, 1 << 14]),
)  # fmt: skip
def test_counts_and_what_is_kept(kind, numel, seed, values_tie, ties, keep, check, dtype, room):
    source = drawn(kind, numel, seed, values_tie)
    keys = source.keys(0, numel).tolist()
    low, high = sorted((keys[seed % numel], keys[seed * 7 % numel]))
    if ties:
        at = Bracket(low, low, seed % 3, seed % 3 + numel // 2, True, 1 + numel // 2 // BINS)
    else:
        at = Bracket(low, high, 0, 10**6, False, -(-(high - low + 1) // BINS))
    narrower = Bracket(low, low + (high - low) // 3, 0, 10**6, False, at.width)

    def work():
        part = Part(source)
        row = torch.ones(2 + BINS, dtype=dtype)  # what is there is added to
        part.count_all(at, row, keep, check)
        assert part.above is not None
        again = torch.ones(2 + BINS, dtype=dtype)
        if keep:
            part.count_kept(narrower, again)
        above = part.above.data.clone()
        chosen = part.chosen(narrower, keep)
        return row, above, part.found, part.keys, again, chosen.data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_CAPACITY", room)
        assert_same(*both(work))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 3, 64])
def test_samples(kind, stride):
    source = drawn(kind, 1000, 5, ties=False)

    def work():
        slots = torch.zeros(-(-source.total // stride), dtype=torch.int32)
        Part(source).sample(stride, slots)
        return (slots,)

    native, plain = both(work)
    assert native[0].count_nonzero() > 0
    assert_same(native, plain)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_seen_if_asked_for(kind, bad):
    values = torch.ones(700)
    values[699] = bad
    for candidates in (~Bits.empty(700), Bits.empty(700)):
        for check in (True, False):
            row = torch.zeros(2 + BINS, dtype=torch.int32)
            at = Bracket(5, 9, 0, 700, False, 1)
            Part(kind(values, candidates, 0, 700)).count_all(at, row, True, check)
            assert int(row[0]) == check


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_largest_and_the_smallest_key(kind):
    """Bins at both ends of what keys can be, in one bracket over everything."""
    source = kind(torch.tensor([0.0, torch.finfo(torch.float32).max]), ~Bits.empty(2), 0, 2)
    at = Bracket(0, TOP, 0, 1, False, -(-(TOP + 1) // BINS))

    def work():
        part, row = Part(source), torch.zeros(2 + BINS, dtype=torch.int32)
        part.count_all(at, row, True, True)
        return row, part.keys

    native, plain = both(work)
    assert_same(native, plain)
    assert int(native[0][2:].sum()) == 2


def test_values_it_does_not_know_go_the_other_way():
    values = torch.arange(16).to(torch.bfloat16)
    assert LargestMagnitude(values, ~Bits.empty(16), 0, 16).native is None
    assert LargestMagnitude(torch.randn(32)[::2], ~Bits.empty(16), 0, 16).native is None
