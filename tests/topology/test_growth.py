"""What compact layers grow by, gathered over micro-batches and ranks."""

import pytest
import torch
import torch.distributed as dist

from sparse_gpt.ops import BlockLayout
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.growth import GROWTH_SCORES, own_range
from sparse_gpt.topology.structure import BlockStructure
from tests.ranks import run_ranks

SHAPE, MICRO_STEPS = (12, 10), 3
CPU = torch.device("cpu")


def gradients(ranks: int) -> torch.Tensor:
    """`[ranks, micro-steps, out, in]`."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2^-8: sums are exact in any order.
    return torch.randint(-999, 999, (ranks, MICRO_STEPS, *SHAPE), generator=generator) / 256


def gathered(kind, block, ranks):
    layout = BlockLayout(SHAPE, block, torch.tensor([0, 3]))
    made = GROWTH_SCORES[kind]({"w": layout}, BlockStructure(block), CPU, MICRO_STEPS)
    growth = made.of("w")
    for gradient in gradients(ranks)[dist.get_rank()]:
        lent = gradient.clone()
        if growth.kind == "norms":
            lent = (lent**2).view(*layout.grid[:1], block[0], -1, block[1]).sum((1, 3))
        growth.add(lent)
        lent.fill_(7.0)  # it was only lent
    assert made.is_finite()
    result = made.weights("w") if block == (1, 1) else made.blocks("w")
    return result, made.peak_bytes, made.held_bytes


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exact_weights_are_the_average_over_ranks_of_the_sum_over_batches(ranks):
    parts = run_ranks(ranks, gathered, "exact", (1, 1), ranks)
    found = torch.cat([part for part, _, _ in parts])
    torch.testing.assert_close(
        found, gradients(ranks).sum((0, 1)).flatten() / ranks, rtol=0, atol=0
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exact_blocks_have_the_scores_of_that_gradient_and_keep_nothing_else(ranks):
    block = (3, 2)
    whole = gradients(ranks).sum((0, 1)) / ranks
    (expected,) = block_scores(
        [(0, whole.flatten())], [SHAPE], block, "l2", lambda t: t, lambda t: t, CPU
    )
    for found, peak, held in run_ranks(ranks, gathered, "exact", block, ranks):
        assert torch.equal(found, expected)
        assert held == 0
        # The lent gradient, what is sent of it, and this rank's range.
        assert 8 * whole.numel() < peak <= 8 * whole.numel() + 4 * (whole.numel() + 64) / ranks


@pytest.mark.parametrize("block", [(1, 1), (3, 2)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_norms_are_summed(ranks, block):
    squares = (gradients(ranks) ** 2).sum((0, 1))
    grid = squares.view(SHAPE[0] // block[0], block[0], -1, block[1]).sum((1, 3)).flatten()
    parts = run_ranks(ranks, gathered, "microbatch_norm", block, ranks)
    if block == (1, 1):
        found = torch.cat([part for part, _, _ in parts])
    else:
        assert all(torch.equal(part, parts[0][0]) for part, _, _ in parts)
        found = parts[0][0].to(torch.int32).view(torch.float32)
    torch.testing.assert_close(found, grid)


@pytest.mark.parametrize("kind", GROWTH_SCORES)
@pytest.mark.parametrize("block", [(1, 1), (3, 2)])
def test_what_is_not_finite_is_said(monkeypatch, kind, block):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    layout = BlockLayout(SHAPE, block, torch.tensor([0, 3]))
    made = GROWTH_SCORES[kind]({"w": layout}, BlockStructure(block), CPU, 1)
    bad = torch.ones(SHAPE if kind == "exact" else layout.grid)
    bad[1, 1] = torch.inf
    made.of("w").add(bad)
    assert not made.is_finite()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("numel", [0, 1, 8, 100, 113])
def test_own_ranges_tile(monkeypatch, ranks, numel):
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    stop = 0
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        first, last = own_range(numel)
        assert first % 8 == 0 and last >= first
        assert first in (stop, last)
        stop = last if last > first else stop
    assert stop == numel
