"""Members in real training: exact zeros, FLOPs, and a resumed run that is the undisturbed one."""

import pytest
import torch

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
    """(step, loss, topology digest) of each step, spent FLOPs, and sparse weights gone stray."""
    seen = []
    with trainer(run_config(corpus, out, **changes)) as made:

        def look(step, health, update):
            seen.append((step, health.loss, made.controller.digest()))

        after_every_step(made, look)
        state = made.fit()
        expected = sum(
            made.ledger.step(
                8, "dense_gradient" if made.controller.grows_by_gradient(t) else "sparse"
            )
            for t in range(1, state.step + 1)
        )
        return seen, state.flops_spent, expected


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("member", CASES)
def test_five_steps_and_a_resume(member, stage, corpus, tmp_path):
    changes = {
        **CASES[member],
        "max_steps": 5,
        "deepspeed__zero_stage": stage,
        "sparsity__update": {"freq": 2, "stop": 5},
    }
    ((whole, spent, expected),) = run_ranks(1, train, corpus, str(tmp_path / "whole"), changes)
    assert [step for step, _, _ in whole] == [1, 2, 3, 4, 5]
    assert spent == expected
    parts = []
    for stop in (3, 5):
        run = {**changes, "stop_at": stop}
        parts += run_ranks(1, train, corpus, str(tmp_path / "parts"), run)[0][0]
    assert parts == whole
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
