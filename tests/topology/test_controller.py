"""The controller over shards that are plain tensors: what runs in real ranks hardly meet."""

import pytest
import torch
import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.shards import Fragment
from sparse_gpt.topology.structure import BlockStructure

NAMES = "abcdefgh"


class Layer:
    pattern = None
    dense_grad = False
    alpha = 1.0


class PlainShards:
    """Eight layers of 8 x 8 on one rank; `parts`: (start, stop) of what it holds of a layer."""

    replicated = False
    device = state_device = torch.device("cpu")

    def __init__(self, parts=None):
        generator = torch.Generator().manual_seed(0)

        def draw(numel):
            return torch.randn(numel, generator=generator)

        self.fragments = {}
        for name in NAMES:
            start, stop = (parts or {}).get(name, (0, 64))
            numel = stop - start
            self.fragments[name] = Fragment(start, draw(numel), draw(numel), draw(numel).abs())
        self.gradients = {name: draw(f.numel) for name, f in self.fragments.items()}

    def batches(self):
        return [list(NAMES)]

    def shape(self, name):
        return (8, 8)

    def fragment(self, name):
        return self.fragments[name] if self.fragments[name].numel else None

    def stepped_gradient(self, fragment):
        return next(self.gradients[n] for n, f in self.fragments.items() if f is fragment)

    def sum_over_ranks(self, values):
        return values

    max_over_ranks = sum_over_ranks


class Optimizer:
    on_stepped = None


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)


def controller(shards, block=(1, 1), units=16, structure=None, **more):
    return TopologyController(
        {name: Layer() for name in NAMES},
        dict.fromkeys(NAMES, units),
        structure or BlockStructure(block),
        METHODS["rigl"](UpdateSchedule(1, 100)),
        0,
        shards,
        **more,
    )


def update(made, step):
    optimizer = Optimizer()
    made.arm(step, True, optimizer)
    optimizer.on_stepped()
    return made.after_step(optimizer)


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_what_regrows_in_a_layer_that_lost_everything_starts_at_zero(block):
    shards = PlainShards()
    made = controller(shards, block, 16 // (block[0] * block[1]), whole_model=True)
    shards.fragments["a"].master.mul_(1e-6)
    shards.gradients["a"].zero_()
    update(made, 1)
    assert made.masks["a"].active == 0
    # Adam on the dense gradient moves every weight and moment; the largest gradients are here.
    shards.gradients["a"].fill_(100.0)
    for name, fragment in shards.fragments.items():
        for tensor in fragment.tensors().values():
            tensor.add_(shards.gradients[name].sign(), alpha=0.01)
    report = update(made, 2)
    assert made.masks["a"].active > 0
    assert report.active == sum(mask.active for mask in made.masks.values())
    for tensor in shards.fragments["a"].tensors().values():
        assert not tensor.any()


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_a_global_start_keeps_the_largest_of_the_model(block):
    shards, size = PlainShards(), block[0] * block[1]
    for i, name in enumerate(NAMES):
        shards.fragments[name].master.mul_(1 + i / 10)
    weights = torch.stack([shards.fragments[name].master.view(8, 8) for name in NAMES])
    made = controller(shards, block, 32 // size, global_start=True)
    # Scores of 2 x 2 blocks are their norms.
    scores = torch.nn.functional.avg_pool2d(weights.double()[:, None] ** 2, block)[:, 0]
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: 8 * 32 // size]] = True
    kept = kept.view(8, -1)
    for name, expected in zip(NAMES, kept, strict=True):
        assert torch.equal(made.masks[name].bits.flags().bool(), expected)
        assert made.targets[name] == made.masks[name].active == int(expected.sum())
    assert sum(made.targets.values()) == 8 * 32 // size
    assert len(set(made.targets.values())) > 1
    # Updates keep the numbers that were found.
    found = dict(made.targets)
    update(made, 1)
    assert {name: mask.active for name, mask in made.masks.items()} == found


def test_a_global_start_that_empties_a_layer_is_refused():
    shards = PlainShards()
    shards.fragments["c"].master.mul_(1e-3)
    with pytest.raises(UserError, match=r"1 layers without an active weight \(c, "):
        controller(shards, global_start=True)


def test_scores_that_are_not_finite_name_the_step():
    shards = PlainShards()
    made = controller(shards)
    shards.fragments["c"].master[int(made.masks["c"].bits.positions()[3])] = float("nan")
    with pytest.raises(UserError, match=r"step 7: .*not finite.*optimizer\.lr"):
        update(made, 7)


def test_a_saved_mask_with_another_count_is_refused():
    made = controller(PlainShards())
    read = {name: mask.bits for name, mask in made.masks.items()}
    flipped = read["d"].data.clone()
    flipped[0] ^= 1
    read["d"] = Bits(flipped, 64)
    with pytest.raises(UserError, match="mask of d has not 16 active units"):
        made.load(read, dict.fromkeys(NAMES, 16))


@pytest.mark.parametrize("transposable", [False, True])
def test_a_saved_mask_of_another_structure_is_refused(transposable):
    structure = BlockStructure(n_m=(2, 8), transposable=transposable)
    made = controller(PlainShards(), structure=structure)
    counts = dict.fromkeys(NAMES, 16)
    made.load({name: mask.bits for name, mask in made.masks.items()}, counts)
    read = {name: mask.bits for name, mask in controller(PlainShards()).masks.items()}
    with pytest.raises(UserError, match="mask of a has not the same number in every group"):
        made.load(read, counts)


def test_a_rank_that_owns_nothing_of_some_layers():
    shards = PlainShards({"a": (0, 0), "b": (24, 64), "h": (0, 0)})
    shards.sum_over_ranks = lambda values: values
    # Another rank holds the rest; alone, this one can only choose among what it has.
    made = controller(PlainShards())
    masks = {name: mask.bits.flags().bool() for name, mask in made.masks.items()}

    class Saved:
        def mask(self, name, start, count, trained=False):
            return masks[name][start : start + count]

    part = TopologyController.__new__(TopologyController)
    part.layers, part.shards, part.structure = made.layers, shards, made.structure
    part._scorer = made._scorer
    read = part.read(Saved())
    assert [read[name].numel for name in "abh"] == [0, 40, 0]
    assert torch.equal(read["b"].flags().bool(), masks["b"][24:])


def test_a_layer_that_lost_everything_is_said(caplog):
    shards = PlainShards()
    shards.fragments["c"].master.mul_(1e-6)
    made = TopologyController(
        {name: Layer() for name in NAMES},
        dict.fromkeys(NAMES, 16),
        BlockStructure(),
        METHODS["gmp"](UpdateSchedule(1, 2)),
        0,
        shards,
        whole_model=True,
    )
    with caplog.at_level("WARNING"):
        report = update(made, 1)
    assert report.active == 16 * len(NAMES)
    assert made.masks["c"].active == 0
    assert "step 1: 1 layers have no active weight any more (c, ...)" in caplog.text
