"""N:M masks: exact counts in W and in its transpose, and no better total to be had."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tile_lp import best_totals
from sparse_gpt.topology.n_m import (
    BITS,
    magnitude_keys,
    n_m_mask,
    pinned,
    random_mask,
    tile_benefits,
    tile_patterns,
    tiles_of,
    transposable_mask,
    transposable_of,
    untiled,
)
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.tile_search import greedy, improve_, repair_

PUBLISHED = [(2, 4), (4, 8), (2, 8), (1, 8)]
NAMES = ["2:4", "4:8", "2:8", "1:8"]


def is_transposable(mask: Tensor, n: int, m: int) -> bool:
    """Of a whole matrix: both it and its transpose have N in each M along their rows."""
    return all(bool((w.reshape(-1, m).sum(1) == n).all()) for w in (mask, mask.t()))


def totals(benefit: Tensor, mask: Tensor) -> np.ndarray:
    return (benefit * mask).sum((1, 2)).double().numpy()


@pytest.fixture(scope="module")
def weights() -> dict[int, Tensor]:
    """1,000 tiles of normal weights for each M, as one matrix."""
    generator = torch.Generator().manual_seed(11)
    return {m: torch.randn(40 * m, 25 * m, generator=generator) for m in (4, 8)}


@pytest.mark.parametrize(("n", "m"), PUBLISHED, ids=NAMES)
def test_a_thousand_tiles_against_the_linear_program(weights, n, m):
    weight = weights[m]
    mask = transposable_of(magnitude_keys(weight), n, m)
    assert is_transposable(mask, n, m)
    tiles = tiles_of(weight.abs(), m)
    best, found = best_totals(tiles, n), totals(tiles, tiles_of(mask, m))
    assert np.all(found <= best * (1 + 1e-6))
    assert found.min() > 0
    worst = (found / best).min()
    assert worst >= 0.999999, f"the worst tile has {worst:.4f} of its optimum"


@pytest.mark.parametrize("shape", ["heavy tails", "few values", "one large"])
def test_other_weights_too(shape):
    generator = torch.Generator().manual_seed(12)
    tiles = torch.randn(200, 8, 8, generator=generator).abs()
    if shape == "heavy tails":
        tiles = tiles**4
    elif shape == "few values":
        tiles = tiles.round()
    else:
        tiles[:, 3, 5] = 1e4
    for n in (1, 2, 4, 7):
        benefit = tile_benefits(magnitude_keys(tiles), random=False)
        mask = transposable_mask(benefit, n)
        assert np.all(totals(tiles, mask) >= 0.999999 * best_totals(tiles, n))
        larger = tiles_of(tiles.view(-1, 16), 16)  # where cycles are not of any length
        benefit = tile_benefits(magnitude_keys(larger), random=False)
        share = totals(larger, transposable_mask(benefit, n)) / best_totals(larger, n)
        assert share.min() >= 0.95


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_are_exact_in_the_matrix_and_its_transpose(data):
    m = data.draw(st.integers(2, 9))
    n = data.draw(st.integers(1, m - 1))
    grid = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    several = data.draw(st.sampled_from([[0.0], [0.0, 1.0], [0.5, -0.5, 0.25, 3e38, 1e-42]]))
    values = rng.choices(several, k=grid[0] * grid[1] * m * m)
    weight = torch.tensor(values).view(grid[0] * m, grid[1] * m)
    mask = transposable_of(magnitude_keys(weight), n, m)
    assert is_transposable(mask, n, m)
    assert mask.sum() * m == n * weight.numel()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_along_the_input_dimension(data):
    m = data.draw(st.integers(2, 9))
    n = data.draw(st.integers(1, m - 1))
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * groups * m,
                                max_size=rows * groups * m))  # fmt: skip
    keys = torch.tensor(values, dtype=torch.int32).view(rows, groups * m)
    mask = n_m_mask(keys, n, m)
    for row, chosen in zip(keys.tolist(), mask.tolist(), strict=True):
        for start in range(0, groups * m, m):
            order = sorted(range(start, start + m), key=lambda i, row=row: (-row[i], i))
            assert {i for i in range(start, start + m) if chosen[i]} == set(order[:n])


def test_the_patterns_of_small_tiles():
    assert [len(tile_patterns(*n_m)) for n_m in ((2, 4), (1, 4), (3, 4), (1, 2), (1, 3))] == [
        90, 24, 24, 2, 6,
    ]  # fmt: skip
    patterns = tile_patterns(2, 4)
    assert len({tuple(p.flatten().tolist()) for p in patterns}) == 90
    assert all(is_transposable(p, 2, 4) for p in patterns)
    # Equal benefits: the first places.
    first = transposable_mask(torch.ones(3, 4, 4, dtype=torch.int64), 2)
    assert first[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_greedy_leaves_tiles_short_and_repair_fills_them():
    """As it was measured for 4:8 (54 % of tiles, density 0.491)."""
    generator = torch.Generator().manual_seed(13)
    benefit = tile_benefits(magnitude_keys(torch.randn(4000, 8, 8, generator=generator)), False)
    mask = greedy(benefit, 4)
    short = (mask.sum(2) < 4).any(1)
    assert 0.50 < short.double().mean() < 0.58
    assert 0.488 < mask.double().mean() < 0.494
    assert (mask.sum(1) <= 4).all() and (mask.sum(2) <= 4).all()
    half = 0.5 * best_totals(benefit[:100].double() / 2**BITS, 4)
    assert np.all(totals(benefit[:100].double() / 2**BITS, mask[:100]) >= half)
    whole = mask[~short].clone()
    repair_(benefit, mask, 4)
    assert (mask.sum(1) == 4).all() and (mask.sum(2) == 4).all()
    assert torch.equal(mask[~short], whole), "what was whole is left alone"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 8), st.data())
def test_repair_of_any_mask_that_is_as_full_as_greedy_leaves_it(seed, m, data):
    n = data.draw(st.integers(1, m - 1))
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(20, m * m, generator=generator).mul(1 << 30).long()
    mask = greedy(order.view(20, m, m), n)  # by something else than the benefits
    benefit = torch.randint(0, 4, (20, m, m), generator=generator)
    repair_(benefit, mask, n)
    assert (mask.sum(1) == n).all() and (mask.sum(2) == n).all()


@pytest.mark.parametrize(("n", "m"), [(2, 5), (3, 6)])
def test_cycles_of_any_length_come_to_the_optimum(n, m):
    generator = torch.Generator().manual_seed(14)
    benefit = torch.randint(0, 1000, (300, m, m), generator=generator)
    mask = greedy(benefit, n)
    repair_(benefit, mask, n)
    short_cycles = mask.clone()
    improve_(benefit, short_cycles, 2)
    assert totals(benefit, short_cycles).sum() < best_totals(benefit, n).sum() - 0.5
    improve_(benefit, mask, m)
    assert np.allclose(totals(benefit, mask), best_totals(benefit, n))
    assert (mask.sum(1) == n).all() and (mask.sum(2) == n).all()


@pytest.mark.parametrize(("n", "m"), PUBLISHED, ids=NAMES)
def test_what_is_pinned_stays_and_the_rest_is_solved_again(n, m):
    generator = torch.Generator().manual_seed(15)
    start = tiles_of(random_mask(1, 0, "h", (20 * m, 20 * m), n, m, True), m)
    kept = start & (torch.rand(start.shape, generator=generator) < 0.6)
    growth = tile_benefits(magnitude_keys(torch.randn(start.shape, generator=generator)), False)
    mask = transposable_mask(pinned(growth, kept), n, start)
    assert (mask & kept).sum() == kept.sum()
    assert (mask.sum(1) == n).all() and (mask.sum(2) == n).all()
    assert np.all(totals(growth, mask & ~kept) >= totals(growth, start & ~kept))
    assert not torch.equal(mask, start)
    # Against the LP in which the pinned ones are free of charge.
    best = best_totals(pinned(growth, kept).double() / 2**BITS, n)
    free = totals(kept.double(), kept) * m * m
    found = totals(growth.double() / 2**BITS, mask & ~kept)
    assert np.all(found >= 0.99999 * (best - free))


def test_a_tile_does_not_depend_on_its_neighbours(monkeypatch):
    keys = magnitude_keys(torch.randn(64, 64, generator=torch.Generator().manual_seed(16)))
    tiles = tile_benefits(tiles_of(keys, 8), False)
    together = transposable_mask(tiles, 4)
    alone = [transposable_mask(tile[None], 4)[0] for tile in tiles]
    assert torch.equal(together, torch.stack(alone))
    monkeypatch.setattr("sparse_gpt.topology.n_m.chunk_size", lambda device: 6 * 64)
    assert torch.equal(together, transposable_mask(tiles, 4))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_tiles_are_row_major(rows, columns, m):
    matrix = torch.arange(rows * columns * m * m).view(rows * m, columns * m)
    tiles = tiles_of(matrix, m)
    assert torch.equal(untiled(tiles, columns * m), matrix)
    for i, j in itertools.product(range(rows), range(columns)):
        wanted = matrix[i * m : (i + 1) * m, j * m : (j + 1) * m]
        assert torch.equal(tiles[i * columns + j], wanted)


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=4, max_size=4))
def test_benefits_are_magnitudes_in_fixed_point(values):
    tile = torch.tensor(values, dtype=torch.float32).view(1, 2, 2)
    benefit = tile_benefits(magnitude_keys(tile), random=False).flatten().tolist()
    top = max(map(Fraction, values))
    assert max(benefit) < 1 << BITS
    if top >= Fraction(2) ** -126:
        assert max(benefit) >= 1 << BITS - 1
    for value, fixed in zip(values, benefit):
        if top:
            share = Fraction(value) / top
            assert abs(Fraction(fixed, max(benefit)) - share) <= Fraction(2, 1 << BITS - 24)


def test_random_masks_depend_on_their_key_alone():
    key = (7, 3, "h.0.attn.q.weight")
    for transposable in (False, True):
        mask = random_mask(*key, (32, 48), 2, 8, transposable)
        assert torch.equal(mask, random_mask(*key, (32, 48), 2, 8, transposable))
        assert bool((mask.view(-1, 8).sum(1) == 2).all())
        assert is_transposable(mask, 2, 8) == transposable
        for other in ((8, 3, key[2]), (7, 4, key[2]), (7, 3, "h.1.attn.q.weight")):
            same = (random_mask(*other, (32, 48), 2, 8, transposable) & mask).sum() / mask.sum()
            assert 0.1 < same < 0.4  # 0.25 by chance, of 384 places
    wanted = random_scores(*key, 0, 32 * 48).view(-1, 4).argmax(1)  # no two are equal here
    assert torch.equal(random_mask(*key, (32, 48), 1, 4, False).view(-1, 4).int().argmax(1), wanted)


def test_random_patterns_are_all_taken():
    for transposable, patterns in ((False, 6), (True, 90)):
        mask = random_mask(1, 0, "h", (128, 512), 2, 4, transposable)
        groups = tiles_of(mask, 4).flatten(1) if transposable else mask.view(-1, 4)
        _, counts = groups.int().unique(dim=0, return_counts=True)
        assert len(counts) == patterns
        if not transposable:
            assert (counts - len(groups) / 6).abs().max() < 5 * (len(groups) / 6) ** 0.5


@pytest.mark.gpu
def test_on_a_gpu():
    keys = magnitude_keys(torch.randn(256, 512, generator=torch.Generator().manual_seed(17)))
    for n, m in PUBLISHED:
        assert torch.equal(transposable_of(keys.cuda(), n, m).cpu(), transposable_of(keys, n, m))
        assert torch.equal(n_m_mask(keys.cuda(), n, m).cpu(), n_m_mask(keys, n, m))
