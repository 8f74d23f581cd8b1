"""Contract 11: a resumed run is the uninterrupted one, bit for bit.

That is at the same number of ranks and ZeRO stage; `test_elastic.py` has the others.
"""

import hashlib

import pytest

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
