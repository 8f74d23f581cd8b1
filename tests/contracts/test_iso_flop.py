"""Model mode and distributions end to end: a run's ledger ends where the dense model's would."""

import pytest
import torch

from sparse_gpt.model.gpt import GPT
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


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
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


GLOBAL = {"max_steps": 6, "sparsity__distribution": "global"}


def start(corpus, out, changes):
    """The first topology: its digest, and active weights by layer."""
    with trainer(run_config(corpus, out, **changes)) as made:
        return made.controller.digest(), made.controller.targets


def test_a_global_start_is_the_same_in_every_layout_and_stays(corpus, tmp_path):
    changes = {**GLOBAL, "deepspeed__zero_stage": 3}
    found = run_ranks(2, start, corpus, str(tmp_path / "two"), changes)
    one = {**GLOBAL, "deepspeed__zero_stage": 0}
    assert run_ranks(1, start, corpus, str(tmp_path / "one"), one) == found[:1]
    run = run_config(corpus, tmp_path, **changes)
    units = solve(run, VOCABULARY).units
    model = GPT(run.gpt_config(VOCABULARY))
    model.init_weights(run.seed)
    first = {name: model.get_parameter(name).detach().abs() for name in units}
    total = sum(kept for kept, _ in units.values())
    least = torch.cat([w.flatten() for w in first.values()]).topk(total).values.min()
    targets = {name: int((weights >= least).sum()) for name, weights in first.items()}
    assert found[0][1] == targets
    whole = run_ranks(2, session, corpus, str(tmp_path / "whole"), changes)
    assert whole[0][2] == targets  # SET keeps the number of a layer
    out = str(tmp_path / "parts")
    run_ranks(2, session, corpus, out, {**changes, "stop_at": 4})
    assert run_ranks(2, session, corpus, out, changes) == whole


def test_a_global_gmp_finds_its_numbers_as_it_prunes(corpus, tmp_path):
    changes = {
        **GLOBAL,
        "sparsity__algorithm": "gmp",
        "sparsity__update": {"freq": 2, "stop": 6, "scope": "model"},
    }
    spent, _, active, _ = run_ranks(2, session, corpus, str(tmp_path / "run"), changes)[0]
    run = run_config(corpus, tmp_path, **changes)
    solution = solve(run, VOCABULARY)
    assert sum(active.values()) == sum(kept for kept, _ in solution.units.values())
    q, o = active["h.0.attn.q.weight"], active["h.0.attn.o.weight"]
    assert o < q  # first drawn half as large
    assert spent == 8 * run_cost(run, VOCABULARY, solution)
