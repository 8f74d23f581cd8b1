"""Model mode end to end: the ledger of a run ends where the dense model's would."""

import pytest

from sparse_gpt.sparse_units import base_cost, run_cost, solve
from tests.contracts.runs import VOCABULARY, run_config, trainer
from tests.contracts.test_resume import state_digest
from tests.ranks import run_ranks

STEPS = 9
CHANGES = {
    "max_steps": STEPS,
    "ift": {"member": "wide", "iso_flop": "model", "head": "project"},
    "sparsity__algorithm": "rigl",
    "sparsity__distribution": "erdos_renyi",
    "sparsity__layer_sparsity": {"h.0.attn.q.weight": 0.0, "h.1.mlp.*.weight": 0.9},
    "sparsity__update": {"freq": 3, "stop": STEPS},
}


def session(corpus, out, changes):
    """What one session leaves behind: state, digest of this rank's shards, active weights."""
    with trainer(run_config(corpus, out, **changes)) as made:
        state = made.fit()
        active = {name: mask.active for name, mask in made.controller.masks.items()}
        return state.flops_spent, state_digest(made), active, made.gpt_config.d_embed


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_spends_what_the_dense_run_would(corpus, tmp_path, stage):
    changes = {**CHANGES, "deepspeed__zero_stage": stage}
    whole = run_ranks(2, session, corpus, str(tmp_path / "whole"), changes)
    run = run_config(corpus, tmp_path, **changes)
    solution, dense = solve(run, VOCABULARY), base_cost(run, VOCABULARY)
    assert run_cost(run, VOCABULARY, solution) * 8 == whole[0][0]
    a_weight = 6 * 32 * STEPS
    assert abs(whole[0][0] / 8 - dense) <= a_weight / 2
    kept = {name: count for name, (count, every) in solution.units.items() if count < every}
    assert whole[0][2] == kept
    assert set(solution.units) - set(kept) == {"h.0.attn.q.weight"}
    assert whole[0][3] == 64
    out = str(tmp_path / "parts")
    run_ranks(2, session, corpus, out, {**changes, "stop_at": 4})
    assert run_ranks(2, session, corpus, out, changes) == whole
