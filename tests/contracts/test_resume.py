"""Contract 11: a resumed run is the uninterrupted one, bit for bit; elsewhere, to rounding."""

import hashlib
import shutil

import pytest
import torch

from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks

STEPS = 13
LAYOUTS = [(stage, "fp32", "none") for stage in (0, 1, 2, 3)]
LAYOUTS += [(stage, "bf16", "none") for stage in (1, 2, 3)]
OFFLOADED = [(stage, precision, "cpu") for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


def changes(stage, precision, offload="none", **more):
    return {
        "max_steps": STEPS,
        "model__dropout": 0.1,
        "schedule__type": "cosine",
        "deepspeed__zero_stage": stage,
        "deepspeed__offload_optimizer": offload,
        "precision": precision,
        "sparsity__algorithm": "rigl",
        # Updates at 3, 6, 9, 12: sessions end before, at and after one.
        "sparsity__update": {"freq": 3, "stop": STEPS},
        **more,
    }


def state_digest(made):
    """sha256 over this rank's masters and moments, and the topology."""
    digest = hashlib.sha256(made.controller.digest().encode())
    for name, fragment in made.shards.fragments():
        digest.update(f"{name}/{fragment.start}".encode())
        for tensor in fragment.tensors().values():
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(corpus, out, config_changes):
    """(step, loss, norm, state digest) of every step of one session."""
    seen = []
    with trainer(run_config(corpus, out, **config_changes)) as made:

        def look(step, health, update):
            lr = made.optimizer.param_groups[0]["lr"]
            seen.append((step, health.loss, health.grad_norm, lr, state_digest(made)))

        after_every_step(made, look)
        made.fit()
    return seen


def check_bitwise(corpus, tmp_path, layout, stops=(5, 9, STEPS)):
    config_changes = changes(*layout)
    whole = run_ranks(2, train, corpus, str(tmp_path / "whole"), config_changes)
    assert [step for step, *_ in whole[0]] == list(range(1, STEPS + 1))
    out, resumed = str(tmp_path / "parts"), [[], []]
    for stop in stops:
        for rank, part in enumerate(
            run_ranks(2, train, corpus, out, config_changes | {"stop_at": stop})
        ):
            resumed[rank] += part
    assert resumed == whole
    assert (tmp_path / "parts/metrics.jsonl").read_text().count('"topology"') == 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_resume_twice_is_bitwise(corpus, tmp_path, layout):
    check_bitwise(corpus, tmp_path, layout)


@pytest.mark.parametrize("layout", [OFFLOADED[3], OFFLOADED[4]], ids=str)
def test_resume_with_offload_is_bitwise(corpus, tmp_path, layout):
    check_bitwise(corpus, tmp_path, layout, stops=(6, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("layout", OFFLOADED, ids=str)
@pytest.mark.parametrize("first", [1, 3, 8])
def test_resume_with_offload_at_other_steps_is_bitwise(corpus, tmp_path, layout, first):
    check_bitwise(corpus, tmp_path, layout, stops=(first, STEPS))


def load_and_step(corpus, out, config_changes):
    """Whole tensors after loading, then the losses of the steps that follow."""
    losses = []
    with trainer(run_config(corpus, out, **config_changes)) as made:
        made.load(made.checkpointer.newest())
        loaded = {}
        for name in made.shards.parameters:
            fragment = made.shards.fragment(name)
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                local = None if fragment is None else fragment.tensors()[kind]
                loaded[kind, name] = made.shards.assemble(name, local)
        topology = {name: p.active for name, p in made.controller.patterns().items()}
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
    return loaded, topology, losses


OTHERS = {
    (2, "fp32"): [(1, 0, "fp32"), (3, 3, "fp32"), (2, 3, "bf16")],
    (3, "bf16"): [(4, 2, "fp32"), (2, 1, "bf16")],
    (0, "fp32"): [(3, 1, "bf16"), (1, 2, "fp32")],
}


@pytest.mark.parametrize("saved_by", OTHERS, ids=str)
def test_resume_in_another_layout(corpus, tmp_path, saved_by):
    """Saved at 2 ranks; other world sizes, stages and precisions read the same numbers."""
    more = {"global_batch_size": 12, "micro_batch_size": 1, "model__dropout": 0.0,
            "evaluation__sequences": 12}  # fmt: skip
    first = changes(*saved_by, **more)
    whole = run_ranks(2, train, corpus, str(tmp_path / "whole"), first)[0]
    wanted = [loss for step, loss, *_ in whole if step > 7]
    run_ranks(2, train, corpus, str(tmp_path / "saved"), first | {"stop_at": 7})
    reader = open_checkpoint(tmp_path / "saved")
    patterns = reader.patterns()
    for number, (ranks, stage, precision) in enumerate(OTHERS[saved_by]):
        out = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "saved", out)
        second = changes(stage, precision, **more)
        second["checkpoint__allow_changed"] = ["precision"]
        for loaded, topology, losses in run_ranks(ranks, load_and_step, corpus, str(out), second):
            for (kind, name), tensor in loaded.items():
                assert torch.equal(tensor, reader.parameter(name, kind)), (kind, name)
            assert topology.keys() == patterns.keys()
            for name, active in topology.items():
                assert torch.equal(active, patterns[name].active), name
            assert len(losses) == len(wanted)
            exact = precision == saved_by[1] == "fp32"
            assert abs(losses[0] - wanted[0]) < (1e-5 if exact else 2e-2), (ranks, stage)
            if exact:
                assert abs(losses[-1] - wanted[-1]) < 1e-3
