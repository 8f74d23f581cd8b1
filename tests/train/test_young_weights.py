"""SMET: grown weights step by a count of their own, against Adam written out a weight at a time."""

from typing import Any

import pytest
import torch

from sparse_gpt.errors import UserError
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.shards import ReplicatedShards
from sparse_gpt.train.checkpoint_files import CheckpointReader
from sparse_gpt.train.optim import AdamW, optimizer_steps, prime_optimizer
from sparse_gpt.train.young_weights import YoungWeights
from tests.contracts.runs import after_every_step, assemble, masks, run_config, trainer
from tests.contracts.sessions import differences, distance, saved_at, whole
from tests.ranks import run_ranks
from tests.tiny import write_corpus

LR, DECAY, EPS, BETAS, WARMUP = 0.05, 0.1, 1e-6, (0.9, 0.8), 4
SIZE = 12
# Masks after the updates of steps 3 and 6: 8 and 9 grow, 9 is dropped while it is young.
MASKS = {0: range(8), 3: [0, 1, 2, 3, 4, 5, 8, 9], 6: [0, 1, 2, 3, 4, 8, 10, 11]}


def gradient(step, i):
    return ((7 * step + 5 * i) % 11 - 4) / 10


def by_hand(steps, grown_up):
    """Weights after so many steps, in Python floats."""
    w = [0.1 * (i + 1) if i < 8 else 0.0 for i in range(SIZE)]
    m, v, born, active = [0.0] * SIZE, [0.0] * SIZE, [-1] * SIZE, set(MASKS[0])
    (beta1, beta2), held = BETAS, {5}
    taken = 0
    for step in range(1, steps + 1):
        taken += step not in held
        for i in active if step not in held else ():
            g = gradient(step, i)
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            age = taken if born[i] < 0 else taken - born[i]
            lr, count = LR, taken
            if born[i] >= 0 and age <= grown_up:
                lr, count = LR * min(1, age / WARMUP), age
            w[i] -= lr * DECAY * w[i]
            w[i] -= lr * m[i] / (1 - beta1**count) / ((v[i] / (1 - beta2**count)) ** 0.5 + EPS)
        if step in MASKS:
            new = set(MASKS[step])
            for i in new - active:
                w[i] = m[i] = v[i] = 0.0
                born[i] = taken
            for i in active - new:
                w[i] = m[i] = v[i] = 0.0
                born[i] = -1
            active = new
    return w


class OneWeight(ReplicatedShards):
    """A whole weight and its optimizer, without an engine."""

    def __init__(self, parameter, optimizer):
        self.parameters, self.base_optimizer = {"w": parameter}, optimizer


def mask_of(units):
    flags = torch.zeros(SIZE, dtype=torch.bool)
    flags[list(units)] = True
    return LayerMask((3, 4), (1, 1), Bits.of(flags), 0, len(list(units)))


def test_every_weight_steps_by_its_own_age():
    start = torch.tensor([0.1 * (i + 1) if i < 8 else 0.0 for i in range(SIZE)]).view(3, 4)
    parameter = torch.nn.Parameter(start)
    optimizer = AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    prime_optimizer(optimizer, [parameter])
    shards = OneWeight(parameter, optimizer)
    young = optimizer.young = YoungWeights(shards, WARMUP, BETAS)
    assert young.grown_up == 66  # 0.9^66 < 0.001 < 0.9^65
    young.grown_up = 7
    mask, many = mask_of(MASKS[0]), []
    for step in range(1, 16):
        parameter.grad = torch.tensor([gradient(step, i) for i in range(SIZE)]).view(3, 4)
        fragment = shards.fragment("w")
        assert fragment is not None
        mask.zero_outside_(parameter.grad.view(-1), 0)
        optimizer.hold = step == 5
        optimizer.step()
        if step in MASKS:
            old, mask = mask, mask_of(MASKS[step])
            kept = LayerMask((3, 4), (1, 1), old.bits & mask.bits, 0, 0)
            kept.zero_outside_(list(fragment.tensors().values()), 0)
            young.move("w", mask.bits - old.bits, mask, optimizer_steps(optimizer))
        many.append(young.layers["w"].positions.numel() if young.layers else 0)
        wanted = torch.tensor(by_hand(step, 7)).view(3, 4)
        assert torch.allclose(parameter.detach(), wanted, rtol=1e-5, atol=1e-7), step
    assert many == [0, 0, 2, 2, 2, 3, 3, 3, 3, 3, 3, 2, 2, 0, 0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", documents=60))


def changes(stage, **more):
    return {
        "deepspeed__zero_stage": stage,
        "sparsity__algorithm": "rigl",
        "sparsity__update": {"freq": 2},
        "optimizer__growth": "smet",
        "optimizer__smet_warmup": 3,
        "max_steps": 7,
        "schedule__warmup_steps": 1,
        **more,
    }


def trained(corpus, out, config_changes):
    """The state at the end, the young weights of each layer by position, and masks by step."""
    with trainer(run_config(corpus, out, **config_changes)) as made:
        seen: dict[int, Any] = {}
        after_every_step(made, lambda step, health, update: seen.update({step: masks(made)}))
        made.fit()
        births = {}
        for name in made.controller.masks:
            fragment, young = made.shards.fragment(name), made.optimizer.young
            local = None
            if fragment is not None:
                local = torch.zeros(fragment.numel)
                found = young.layers.get(name) if young else None
                if found is not None:
                    local[found.positions] = found.births.float()
            births[name] = assemble(made, name, local)
        rates = [group["lr"] for group in made.optimizer.param_groups]
        return {"whole": whole(made), "births": births, "masks": seen, "rates": rates}


def grown_at(masks_by_step):
    """The step of the last growth of each weight that is active at the end, 0 for none."""
    last = masks_by_step[max(masks_by_step)]
    births = {name: torch.zeros(mask.shape) for name, mask in last.items()}
    for step in sorted(masks_by_step)[1:]:
        for name, mask in masks_by_step[step].items():
            births[name][mask & ~masks_by_step[step - 1][name]] = step
    return {name: found * last[name] for name, found in births.items()}


def test_layouts_agree_on_births_and_rates(corpus, tmp_path):
    runs = {
        (ranks, stage): run_ranks(
            ranks, trained, corpus, str(tmp_path / f"{ranks}-{stage}"), changes(stage)
        )[0]
        for ranks, stage in ((1, 0), (2, 3))
    }
    first = runs[1, 0]
    wanted = grown_at(first["masks"])
    assert sum(int((found > 0).sum()) for found in wanted.values()) > 100
    density = sum(int(m.sum()) for m in first["whole"].masks.values()) / sum(
        m.numel() for m in first["whole"].masks.values()
    )
    for run in runs.values():
        assert run["rates"][0] == pytest.approx(run["rates"][1] / density, rel=1e-12)
        for name, births in run["births"].items():
            assert torch.equal(births, wanted[name])
        assert distance(first["whole"].tensors, run["whole"].tensors) < 1e-4


def test_resumed_bit_for_bit(corpus, tmp_path):
    """Young weights come back, to as many ranks and to others."""
    straight = run_ranks(2, trained, corpus, str(tmp_path / "one"), changes(2))[0]
    run_ranks(2, trained, corpus, str(tmp_path / "two"), changes(2, stop_at=5))
    elsewhere = saved_at(tmp_path / "two", 5, tmp_path / "three")
    resumed = run_ranks(2, trained, corpus, str(tmp_path / "two"), changes(2))[0]
    assert differences(straight["whole"], resumed["whole"]) == []
    assert all(torch.equal(straight["births"][n], b) for n, b in resumed["births"].items())
    one = run_ranks(1, trained, corpus, str(elsewhere), changes(3))[0]
    assert all(torch.equal(straight["births"][n], b) for n, b in one["births"].items())
    reader = CheckpointReader(tmp_path / "two" / "checkpoints" / "step-00000007")
    for name, (positions, births) in reader.young().items():
        assert torch.equal(straight["births"][name].view(-1)[positions], births.float())


@pytest.mark.parametrize("algorithm", ["static", "gmp"])
def test_nothing_grows_from_zero(algorithm):
    with pytest.raises(UserError, match=r"optimizer\.growth: smet is for weights that grow"):
        run_config("x", "y", optimizer__growth="smet", sparsity__algorithm=algorithm)


def test_a_warmup_that_nothing_uses():
    with pytest.raises(UserError, match="smet_warmup is set, but growth is global_step"):
        run_config("x", "y", optimizer__smet_warmup=3)
