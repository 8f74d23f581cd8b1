"""Top-k over shards against a plain sort, for any split of any tensors.

Small bins, samples and chunks make small tensors take every path of large ones: several rounds,
brackets that miss on either side, candidates that are too many to keep, ties narrowed by position.
"""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology import select
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import LargestMagnitude
from sparse_gpt.topology.select import select_top
from tests.topology.exchange import splits
from tests.topology.selections import KINDS, Layer, check, choose, count, many_layers, tuned

TUNINGS = st.fixed_dictionaries(
    {
        "bins": st.sampled_from([2, 3, 16, 2048]),
        "sample": st.sampled_from([1, 8, 64, 1 << 14]),
        "sigmas": st.sampled_from([0.0, 0.1, 5.0]),
        "share": st.sampled_from([0.0, 1 / 8]),
        "chunk": st.sampled_from([8, 24, 1 << 17]),
        "native": st.booleans(),
    }
)
SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)
POOLS = [
    st.sampled_from([0.0, -0.0]),
    st.sampled_from([0.0, 0.25, -0.25, 0.5, 0.5000001, 1.0]),
    st.sampled_from([0.0, SMALLEST, -SMALLEST, 2 * SMALLEST, 2.0**-126, 2.0**-127]),
    st.sampled_from([1.0, LARGEST, -LARGEST, 3e38, 2.0**-149]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
]


@st.composite
def layers(draw, sizes, ranks: int, pool, name: str = "x") -> Layer:
    """Any values, any candidates, cut anywhere into `ranks` parts."""
    numel = draw(sizes)
    values = torch.tensor(draw(st.lists(pool, min_size=numel, max_size=numel)))
    if draw(st.booleans()):
        values = values.bfloat16()
        values[~values.isfinite()] = 1.0
    everything = draw(st.booleans())
    flags = st.just(True) if everything else st.booleans()
    candidates = torch.tensor(draw(st.lists(flags, min_size=numel, max_size=numel)))
    inner = draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1))
    edges = [0, *sorted(inner), numel]
    return Layer(values, candidates, list(pairwise(edges)), name)


def some_count(draw, of: int) -> int:
    """Often none or all."""
    return draw(st.sampled_from([0, of]) | st.integers(0, of))


@st.composite
def selections(draw, most: int = 24):
    """(kind, groups, counts): one or two groups of one to three layers on 1 to 5 ranks."""
    ranks, kind, pool = draw(st.integers(1, 5)), draw(st.sampled_from(KINDS)), None
    groups, counts = [], []
    for g in range(draw(st.integers(1, 2))):
        pool = draw(st.sampled_from(POOLS))
        group = [
            draw(layers(st.integers(1, most), ranks, pool, f"{g}.{i}"))
            for i in range(draw(st.integers(1, 3)))
        ]
        groups.append(group)
        counts.append(some_count(draw, count(group)))
    return kind, groups, counts


@settings(max_examples=200, deadline=None)
@given(selections(), TUNINGS)
def test_against_a_plain_sort(selection, tuning):
    with tuned(**tuning):
        check(*selection)


@settings(max_examples=40, deadline=None)
@given(selections())
def test_against_a_plain_sort_as_it_is_tuned(selection):
    check(*selection)


def drawn_layer(rng: random.Random, ranks: int, name: str = "x", most: int = 2000) -> Layer:
    """A larger layer from a seed: normal values, or coarse ones, or mostly zeros, or tiny ones."""
    numel = rng.choice([rng.randint(1, 100), rng.randint(100, most), rng.randint(100, most)])
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    values = torch.randn(numel, generator=generator)
    kind = rng.choice(["normal", "ties", "zeros", "sorted", "few", "tiny"])
    if kind == "ties":
        values = (2 * values).round()
    elif kind == "zeros":
        values *= torch.rand(numel, generator=generator) < 0.1
    elif kind == "sorted":  # no part looks like the whole
        values = values.sort().values
    elif kind == "few":
        values = torch.where(values > 2.5, 1e30, values * 1e-30)
    elif kind == "tiny":
        values = values * 1e-42
    candidates = torch.rand(numel, generator=generator) < rng.choice([0.01, 0.25, 0.9, 1.0])
    edges = [0, *sorted(rng.randint(0, numel) for _ in range(ranks - 1)), numel]
    return Layer(values, candidates, list(pairwise(edges)), name)


def try_larger_layers(seed: int) -> None:
    rng = random.Random(seed)
    ranks, whole_model = rng.randint(1, 5), rng.random() < 0.3
    made = [drawn_layer(rng, ranks, str(i)) for i in range(rng.randint(1, 4))]
    groups = [made] if whole_model else [[layer] for layer in made]
    counts = []
    for group in groups:
        many = count(group)
        counts.append(rng.choice([0, many, many // 4, *(rng.randint(0, many) for _ in range(5))]))
    with tuned(
        bins=rng.choice([2, 16, 2048]),
        sample=rng.choice([8, 64, 1 << 14]),
        sigmas=rng.choice([0.0, 5.0]),
        share=rng.choice([0.0, 1 / 8]),
        chunk=rng.choice([8, 64, 1 << 17]),
        native=rng.random() < 0.5,
    ):
        check(rng.choice(KINDS), groups, counts)


def test_larger_layers(monkeypatch):
    """And the tunings lead through misses on both sides, ties, and both ways to count."""
    seen = Counter()
    narrow = select._Group.narrow

    def spy(group, above, bins, kept):
        if group.proposed_in is not None:
            missed = "above" if group.k <= above else "below"
            hit = above < group.k <= above + int(bins.sum())
            seen["hit" if hit else missed] += 1
        seen["ties" if group.ties else "keys"] += 1
        seen["kept" if kept else "looked for again"] += 1
        narrow(group, above, bins, kept)

    monkeypatch.setattr(select._Group, "narrow", spy)
    for seed in range(80):
        try:
            try_larger_layers(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert {"above", "below", "hit", "ties", "keys", "kept", "looked for again"} == set(seen)
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("native", [True, False])
def test_every_count(kind, native):
    """A cut just above a guessed bracket, at its ends, just below it; on values and on ties."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(60, generator=generator)
    everything = torch.ones(60, dtype=torch.bool)
    for of in (values, (values * 3).round()):
        layer = Layer(of, everything, [(0, 25), (25, 60)])
        with tuned(bins=16, sample=4, sigmas=0.0, native=native):
            for k in range(61):
                check(kind, [[layer]], [k])


# What does not depend on the split


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(KINDS), TUNINGS)
def test_every_split_chooses_the_same_in_the_same_exchanges(data, kind, tuning):
    layer = data.draw(layers(st.integers(1, 200), 1, data.draw(st.sampled_from(POOLS))))
    k = some_count(data.draw, count([layer]))
    with tuned(**tuning):
        alone = check(kind, [[layer]], [k])
        layer.parts = data.draw(splits(layer.numel))
        together = choose(kind, [[layer]], [k])
    assert together == alone


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_a_gpu(kind):
    layer = many_layers(100_000, 1, 1)[0]
    layer.values = (layer.values * 50).round() / 50
    k = count([layer]) // 3
    for tuning in ({}, {"bins": 64, "sample": 64, "share": 0.0}):
        with tuned(**tuning):
            here, there = layer.source(kind, 0, 0), layer.source(kind, 0, 0)
            there.candidates = there.candidates.to("cuda")
            if isinstance(there, LargestMagnitude):
                there.values = there.values.cuda()
            many = [count([layer])]
            ((mine,),) = select_top([[here]], [k], many, lambda values: values)
            ((gpus,),) = select_top([[there]], [k], many, lambda values: values)
            assert torch.equal(mine.data, gpus.data.cpu())


def test_a_tie_in_a_model_of_more_weights_than_32_bits_count():
    """The cut lies in the first layer; the second begins far behind it."""
    same, everything = torch.ones(1000), ~Bits.empty(1000)
    for base in (1000, 3 << 30, (1 << 32) + 100):
        sources = [LargestMagnitude(same, everything, 0, 1000, b) for b in (0, base)]
        first, second = select_top([sources], [300], [2000], lambda values: values)[0]
        assert first.positions().tolist() == list(range(300))
        assert second.positions().tolist() == []
