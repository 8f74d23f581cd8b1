"""Members in real training: exact zeros, FLOPs, and a resumed run that is the undisturbed one."""

import pytest
import torch

from sparse_gpt.sparse_units import run_cost
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus

CASES = {
    "parallel": {"ift": {"member": "parallel"}, "sparsity__algorithm": "rigl"},
    "factorized": {"ift": {"member": "factorized", "non_linearity": "gelu"}},
    "doped": {"ift": {"member": "doped", "keep_dense": ["h.0.attn.*"]}},
    "low_rank": {
        "ift": {"member": "low_rank", "k_lr": 1.5},
        "sparsity": {"sparsity": 0.0},
    },
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=2))


def train(corpus, out, changes):
    """(step, loss, topology digest) of each step, spent FLOPs, and those foreseen of the run."""
    seen = []
    with trainer(run_config(corpus, out, **changes)) as made:

        def look(step, health, update):
            seen.append((step, health.loss, made.controller.digest()))

        after_every_step(made, look)
        state = made.fit()
        foreseen = 8 * run_cost(made.config, made.vocab_size, made.solution)
        return seen, state.flops_spent, foreseen


def changes_of(member, **more):
    return {
        **CASES[member],
        "max_steps": 5,
        "deepspeed__zero_stage": 2,
        "sparsity__update": {"freq": 2, "stop": 5},
        **more,
    }


def in_two_parts(ranks, corpus, out, changes):
    """What rank 0 saw in a session of three steps and one of the two others."""
    parts = []
    for stop in (3, 5):
        parts += run_ranks(ranks, train, corpus, str(out), changes | {"stop_at": stop})[0][0]
    return parts


@pytest.mark.parametrize("member", CASES)
def test_five_steps_and_a_resume(member, corpus, tmp_path):
    changes = changes_of(member)
    ((whole, spent, foreseen),) = run_ranks(1, train, corpus, str(tmp_path / "whole"), changes)
    assert [step for step, _, _ in whole] == [1, 2, 3, 4, 5]
    assert spent == foreseen
    assert in_two_parts(1, corpus, tmp_path / "parts", changes) == whole
    config = run_config(corpus, tmp_path / "whole", **changes)
    reader = open_checkpoint(tmp_path / "whole")
    assert reader.gpt_config == config.gpt_config(257)
    for name, pattern in reader.patterns().items():
        weight = reader.parameter(name)
        assert torch.equal(weight, pattern.apply(weight))
        assert 0 < torch.count_nonzero(weight) <= pattern.active.sum()
    assert bool(reader.layers) == (member != "low_rank")
    digests = {digest for _, _, digest in whole}
    assert len(digests) == (1 if member == "low_rank" else 3)  # updates at 2 and 4


SLOW = ("parallel", "factorized", "low_rank")


@pytest.mark.parametrize(
    "member", ["doped", *(pytest.param(member, marks=pytest.mark.slow) for member in SLOW)]
)
def test_nothing_whole_on_any_rank(member, corpus, tmp_path):
    """At stage 3 not even the bias stays gathered, which a layer hands to one of its parts."""
    changes = changes_of(member)
    ((whole, spent, _),) = run_ranks(1, train, corpus, str(tmp_path / "whole"), changes)
    changes |= {"deepspeed__zero_stage": 3, "deepspeed__param_persistence_threshold": 0}
    one, other = run_ranks(2, train, corpus, str(tmp_path / "sharded"), changes)
    assert one == other and one[1] == spent
    losses = [[loss for _, loss, _ in steps] for steps in (one[0], whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert in_two_parts(2, corpus, tmp_path / "parts", changes) == one[0]
