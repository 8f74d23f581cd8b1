"""Random scores: a function of (seed, update, layer, index), uniform enough to choose by."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology.random import random_scores

MASK = 2**64 - 1


def oracle(seed, update, layer, index):
    """SplitMix64's finaliser in Python's own integers."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{update}/{layer}".encode()).digest()[:8], "little")
    x = (index * 0x9E3779B97F4A7C15 + key) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return (x ^ (x >> 31)) >> 2


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 10**11))
def test_against_the_oracle(seed, update, layer, start):
    got = random_scores(seed, update, layer, start, 5).tolist()
    assert got == [oracle(seed, update, layer, start + i) for i in range(5)]
    assert all(0 <= score < 2**62 for score in got)


@given(st.integers(0, 400), st.integers(0, 400))
def test_parts_are_those_of_the_whole(a, b):
    start, end = min(a, b), max(a, b)
    whole = random_scores(3, 1, "h.0.attn.q.weight", 0, 400)
    part = random_scores(3, 1, "h.0.attn.q.weight", start, end - start)
    assert torch.equal(whole[start:end], part)
    assert part.dtype == torch.int64


def test_the_global_generator_is_neither_used_nor_moved():
    before = torch.get_rng_state()
    first = random_scores(1, 2, "layer", 0, 100)
    torch.manual_seed(99)
    assert torch.equal(random_scores(1, 2, "layer", 0, 100), first)
    torch.set_rng_state(before)


@pytest.mark.parametrize("other", [(2, 0, "a"), (1, 1, "a"), (1, 0, "b")])
def test_every_part_of_the_key_counts(other):
    seed, update, layer = other
    mine = random_scores(1, 0, "a", 0, 2000)
    theirs = random_scores(seed, update, layer, 0, 2000)
    assert not torch.isin(mine, theirs).any()
    assert abs(torch.corrcoef(torch.stack([mine, theirs]).double())[0, 1]) < 0.08


def test_distribution():
    """Uniform over [0, 2^62) in every 64th, and no serial correlation (5 standard errors)."""
    n = 1 << 17
    scores = random_scores(7, 3, "h.5.mlp.fc1.weight", 0, n)
    assert scores.unique().numel() == n
    counts = torch.bincount(scores >> 56, minlength=64)
    assert counts.shape == (64,)
    assert ((counts - n / 64).abs() < 5 * (n / 64) ** 0.5).all()
    bits = torch.stack([(scores >> bit) & 1 for bit in range(62)]).double().mean(1)
    assert ((bits - 0.5).abs() < 5 * 0.5 / n**0.5).all()
    x = scores.double() / 2**62 - 0.5
    assert abs(float((x[1:] * x[:-1]).mean()) * 12) < 5 / n**0.5


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    assert torch.equal(random_scores(1, 2, "x", 5, 1000, "cuda").cpu(),
                       random_scores(1, 2, "x", 5, 1000))  # fmt: skip
