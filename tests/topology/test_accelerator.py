"""The branches taken on an accelerator give what those of the CPU give.

On tensors that only say where they are; tests marked gpu do the same on a real one.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology.bits import Bits, pack, unpack
from sparse_gpt.topology.block_scores import block_scores
from sparse_gpt.topology.grouped import GroupedUnits
from sparse_gpt.topology.keys import LargestMagnitude
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.methods.base import drop_and_grow
from sparse_gpt.topology.random import RandomKey
from sparse_gpt.topology.select import select_top
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.topology.units import BlockUnits, LayerPart, UnitSet
from tests.topology.accelerator import THERE, pretending
from tests.topology.selections import KINDS, count, many_layers, tuned

FLAGS = st.lists(st.booleans(), max_size=70)


def test_it_pretends():
    with pretending():
        here, there = torch.arange(3), torch.arange(3).to("cuda")
        assert there.device == THERE and (there + 1).device == THERE
        assert torch.zeros(2, device=THERE).device == THERE
        assert there.cpu().device == here.device == torch.device("cpu")
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
            there + here
        there += 1
        assert there.cpu().numpy().tolist() == [1, 2, 3]


@given(FLAGS, st.randoms(use_true_random=False))
def test_bits(flags, rng):
    here = Bits.of(torch.tensor(flags, dtype=torch.bool))
    new = [i for i, flag in enumerate(flags) if not flag and rng.random() < 0.5]
    with pretending():
        there = Bits.of(torch.tensor(flags, dtype=torch.bool).to(THERE))
        assert there.data.device == THERE
        assert torch.equal(there.data.cpu(), here.data)
        assert torch.equal(there.flags().cpu(), here.flags())
        assert torch.equal(there.positions().cpu(), here.positions())
        assert there.count().item() == here.count().item() and there.count().device == THERE
        assert torch.equal((~there).data.cpu(), (~here).data)
        there.add_(torch.tensor(new, dtype=torch.int64, device=THERE))
        here.add_(torch.tensor(new, dtype=torch.int64))
        assert torch.equal(there.data.cpu(), here.data)


def test_every_byte():
    data = torch.arange(256, dtype=torch.uint8)
    with pretending():
        flags = unpack(data.to(THERE))
        assert torch.equal(flags.cpu(), unpack(data))
        assert torch.equal(pack(flags).cpu(), data)
        for byte in range(256):
            one = Bits(data[byte : byte + 1].to(THERE), 8)
            assert one.count().item() == byte.bit_count()


def test_flags_may_be_a_view():
    flags = torch.arange(24) % 3 == 0
    with pretending():
        assert torch.equal(Bits.of(flags.to(THERE)[3:19]).data.cpu(), Bits.of(flags[3:19]).data)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**33))
def test_random_scores(low, high, start):
    key = RandomKey(low, high)
    with pretending():
        there = key.range(start, start + 10, THERE)
        assert there.device == THERE and there.dtype == torch.int32
        assert torch.equal(there.cpu(), key.range(start, start + 10))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(KINDS), st.booleans())
def test_select(seed, kind, whole_model):
    rng = random.Random(seed)
    layers = many_layers(rng.choice([20, 300]), 1, 2)
    for layer in layers:
        layer.values = (layer.values * 10).round() / 10
    groups = [layers] if whole_model else [[layer] for layer in layers]
    candidates = [count(group) for group in groups]
    counts = [rng.randint(0, many) for many in candidates]

    def choose(device: torch.device) -> list[list[Bits]]:
        sources = []
        for group in groups:
            made = [layer.source(kind, 0, 1000 * i) for i, layer in enumerate(group)]
            for source in made:
                source.candidates = source.candidates.to(device)
                if isinstance(source, LargestMagnitude):
                    source.values = source.values.to(device)
            sources.append(made)
        return select_top(sources, counts, candidates, lambda values: values)

    with tuned(
        bins=rng.choice([2, 16, 2048]),
        sample=rng.choice([8, 1 << 14]),
        sigmas=rng.choice([0.0, 5.0]),
        share=rng.choice([0.0, 1 / 8]),
        chunk=rng.choice([64, 1 << 17]),
    ):
        wanted = choose(torch.device("cpu"))
        with pretending():
            for mine, theirs in zip(wanted, choose(THERE), strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert b.data.device == THERE
                    assert torch.equal(a.data, b.data.cpu())


@pytest.mark.parametrize("score", ["l2", "max"])
@pytest.mark.parametrize("offload", [False, True])
def test_block_scores(score, offload):
    """Weights on the accelerator, or on the host (CPU offload)."""
    weight = torch.randn(12 * 20, generator=torch.Generator().manual_seed(0))

    def scored(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        parts = [(7, weight[7:231]), None]
        shapes = [(12, 20), (3, 5)]
        both = block_scores(
            parts, shapes, (3, 5), score, lambda values: values, lambda values: values, device
        )
        return torch.cat(both).cpu()

    wanted = scored(weight, torch.device("cpu"))
    with pretending():
        assert torch.equal(scored(weight if offload else weight.to(THERE), THERE), wanted)


@pytest.mark.parametrize("block", [(1, 1), (3, 5)])
@pytest.mark.parametrize("of_bits", ["cpu", "cuda"])
def test_masks(block, of_bits):
    """Masks follow to where the tensor is."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(6, 4, generator=generator) < 0.3
    bits, shape = Bits.of(active), (6 * block[0], 4 * block[1])
    values = torch.randn(shape[0] * shape[1], generator=generator)
    here = LayerMask(shape, block, bits, 0, int(active.sum()))
    wanted = values.clone()
    here.zero_outside_(wanted, 0)
    with pretending():
        there, moved = LayerMask(shape, block, bits.to(of_bits), 0, here.active), values.to(THERE)
        assert there.square_sum(moved, 0).item() == here.square_sum(values, 0).item()
        there.zero_outside_(moved, 0)
        assert torch.equal(moved.cpu(), wanted)


@pytest.mark.parametrize("score", ["smallest magnitude", "random"])
@pytest.mark.parametrize("whole_model", [False, True])
def test_block_units(score, whole_model):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, 5, (30,), generator=generator) for _ in range(2)]
    counts = [20] if whole_model else [5, 15]

    def best(device: torch.device) -> list[Bits]:
        units = BlockUnits(
            ["a", "b"], {"magnitude": [s.to(device) for s in scores]}, (1, 2), whole_model
        )
        everything = UnitSet([~Bits.empty(30, device)] * 2, [30] * 2, [30] * 2)
        return units.best(score, everything, counts).parts

    wanted = best(torch.device("cpu"))
    with pretending():
        for mine, theirs in zip(wanted, best(THERE), strict=True):
            assert torch.equal(mine.data, theirs.data.cpu())


@pytest.mark.parametrize("structure", [(2, 4, True), (2, 8, True), (2, 4, False), None])
def test_groups(structure):
    """Growth from nothing, and of tiles and groups that lost some."""
    made = BlockStructure(balanced=True)
    if structure is not None:
        made = BlockStructure(n_m=structure[:2], transposable=structure[2])
    shape, generator = (16, 24), torch.Generator().manual_seed(1)
    count = 16 * 24 // (2 if structure is None else structure[1] // structure[0])
    groups = made.groups(shape, count)
    assert groups is not None
    values = [torch.randn(16 * 24, generator=generator) for _ in range(2)]

    def grown(device):
        part = LayerPart(0, *(v.to(device) for v in values))
        units = GroupedUnits(["h"], [part], lambda v: v, (1, 2), [groups])
        nothing = UnitSet([Bits.empty(16 * 24, device)], [0], [16 * 24])
        active = units.pattern("random", ~nothing, [count])
        assert active.parts[0].data.device == device
        new = drop_and_grow(units, active, 0.5, "largest gradient").sets.forward
        return [units.parts[0].flags().cpu() for units in (active, new)]

    here = grown(torch.device("cpu"))
    with pretending():
        there = grown(THERE)
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(*here)
