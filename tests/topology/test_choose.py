"""The first topology's choice among scores, against repeated maxima in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology.init_masks import Choice, choose
from sparse_gpt.topology.init_masks.force import round_counts
from sparse_gpt.topology.init_masks.grasp import gradient_flow
from sparse_gpt.topology.init_masks.snip import sensitivity
from sparse_gpt.topology.structure import BlockStructure

SHAPES = [(2, 4), (4, 2), (1, 6)]


def choice(shapes, block=(1, 1)):
    return Choice(
        [f"layer{i}" for i in range(len(shapes))],
        shapes,
        BlockStructure(block, "l2"),
        lambda values: values,
        lambda values: values,
        torch.device("cpu"),
    )


def chosen(scores, total, signed=False, block=(1, 1)):
    shapes = [tuple(score.shape) for score in scores]
    parts = [(0, score.reshape(-1)) for score in scores]
    found = choose(choice(shapes, block), parts, total, signed)
    assert found.sizes == [int(bits.count()) for bits in found.parts]
    return [set(bits.positions().tolist()) for bits in found.parts]


def oracle(scores, total):
    """One unit at a time: of each layer its first best, then the first best of the others."""
    left = {(i, j): value for i, layer in enumerate(scores) for j, value in enumerate(layer)}
    taken = [set() for _ in scores]
    for i, layer in enumerate(scores):
        best = max(range(len(layer)), key=lambda j: (layer[j], -j))
        taken[i].add(best)
        del left[i, best]
    while sum(map(len, taken)) < total:
        i, j = max(left, key=lambda u: (left[u], -u[0], -u[1]))
        taken[i].add(j)
        del left[i, j]
    return taken


@st.composite
def cases(draw, low):
    values = [draw(st.lists(st.integers(low, 4), min_size=n, max_size=n)) for n in (8, 8, 6)]
    return values, draw(st.integers(3, 22))


@settings(max_examples=60, deadline=None)
@given(case=cases(-4), signed=st.booleans())
def test_the_best_of_every_layer_then_of_the_model(case, signed):
    values, total = case
    scores = [torch.tensor(v, dtype=torch.float32).view(s) for v, s in zip(values, SHAPES)]
    if not signed:
        values = [[abs(value) for value in layer] for layer in values]
    assert chosen(scores, total, signed) == oracle(values, total)


@settings(max_examples=30, deadline=None)
@given(case=cases(0))
def test_blocks_by_the_norm_of_their_scores(case):
    values, total = case
    columns = [torch.tensor(v, dtype=torch.float32) for v in values]
    # Blocks of 1 x 2: (3 v, 4 v) has norm 5 v.
    scores = [torch.stack([3 * c, 4 * c], 1).view(s[0], -1) for c, s in zip(columns, SHAPES)]
    assert chosen(scores, total, block=(1, 2)) == oracle(values, total)


@pytest.mark.parametrize("total", [2, 23])
def test_a_total_that_does_not_suit_the_layers(total):
    with pytest.raises(ValueError, match=f"cannot choose {total} of 22 units in 3 layers"):
        chosen([torch.ones(shape) for shape in SHAPES], total)


@given(target=st.integers(1, 10**6), more=st.integers(1, 10**6), rounds=st.integers(2, 100))
def test_force_comes_down_exponentially(target, more, rounds):
    counts = round_counts(target + more, target, rounds)
    assert len(counts) == rounds and counts[-1] == target
    assert counts == sorted(counts, reverse=True) and counts[0] <= target + more
    ratio = (target / (target + more)) ** (1 / rounds)
    assert math.isclose(counts[0], ratio * (target + more), abs_tol=0.51, rel_tol=1e-9)


def test_scores_of_single_weights():
    weight, other = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([-1.0, -2.0, 4.0])
    assert sensitivity(weight, other).tolist() == [2.0, 6.0, 2.0]
    assert gradient_flow(weight, other).tolist() == [-2.0, 6.0, 2.0]
