"""Contract 11: a resumed run is the uninterrupted one, bit for bit.

That is at the same number of ranks and ZeRO stage; `test_elastic.py` has the others.
"""

import hashlib

import pytest

from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus

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


def windows(corpus, out):
    with trainer(run_config(corpus, out)) as made:
        return made.train_data.n_items


def test_resume_around_the_end_of_an_epoch_is_bitwise(tmp_path):
    """The third or a later step's batch begins in one epoch and ends in the next."""
    corpus = str(write_corpus(tmp_path / "tiny", documents=5, val_documents=10))
    (epoch,) = run_ranks(1, windows, corpus, str(tmp_path / "look"))
    crossing, inside = divmod(epoch, 8)
    assert inside and 3 <= crossing < STEPS - 2
    check_bitwise(corpus, tmp_path, (2, "fp32", "none"), (crossing, crossing + 1, STEPS))


def test_a_run_that_had_ended_goes_on_when_it_is_made_longer(corpus, tmp_path):
    """Under a schedule that does not look at the end: bit for bit the longer run."""
    given = changes(2, "fp32", schedule__type="constant", sparsity__update={"freq": 3, "stop": 7})
    whole = run_ranks(2, train, corpus, str(tmp_path / "whole"), given)
    out, short = str(tmp_path / "parts"), given | {"max_steps": 8}
    first = run_ranks(2, train, corpus, out, short)
    assert run_ranks(2, train, corpus, out, short) == [[], []]  # there is nothing left to do
    longer = given | {"checkpoint__allow_changed": ["max_steps"]}
    rest = run_ranks(2, train, corpus, out, longer)
    assert [a + b for a, b in zip(first, rest)] == whole


@pytest.mark.slow
@pytest.mark.parametrize("layout", OFFLOADED, ids=str)
@pytest.mark.parametrize("first", [1, 3, 8])
def test_resume_with_offload_at_other_steps_is_bitwise(corpus, tmp_path, layout, first):
    check_bitwise(corpus, tmp_path, layout, stops=(first, STEPS))
