"""The first topology: exact counts, from (seed, name) alone."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.model.flops import kept_units
from sparse_gpt.topology.init_masks import random_pattern
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.structure import BlockStructure


@given(st.integers(1, 10**12), st.integers(0, 999))
def test_kept_units_is_the_exact_share(units, thousandths):
    share = (1 - Fraction(thousandths, 1000)) * units
    nearest = int(share) + (share - int(share) > Fraction(1, 2))
    half = share - int(share) == Fraction(1, 2)
    wanted = int(share) + int(share) % 2 if half else nearest
    assert kept_units(units, thousandths / 1000) == max(1, wanted)


@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
@pytest.mark.parametrize("units", [1, 13, 20])
def test_exact_count_of_the_highest_scores(block, units):
    structure = BlockStructure(block)
    shape = (4 * block[0], 5 * block[1])
    pattern = random_pattern("h.0.attn.q.weight", shape, structure, units, seed=3)
    assert pattern.block == block and pattern.shape == shape
    scores = random_scores(3, 0, "h.0.attn.q.weight", 0, 20).tolist()
    best = sorted(range(20), key=lambda i: -scores[i])[:units]
    assert pattern.active.reshape(-1).nonzero().flatten().tolist() == sorted(best)


def test_layers_and_seeds_differ():
    args = ((32, 32), BlockStructure(), 256)
    masks = [
        random_pattern(name, *args, seed).active for name, seed in (("a", 1), ("b", 1), ("a", 2))
    ]
    overlaps = [int((masks[i] & masks[j]).sum()) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert all(30 < overlap < 98 for overlap in overlaps)  # 64 +- 5 sigma by chance
    assert torch.equal(random_pattern("a", *args, 1).active, masks[0])
