"""Memory of growth by gradient over compact storage: what is planned against what runs hold."""

import pytest

from sparse_gpt.plan import plan
from tests.contracts.runs import VOCABULARY, after_every_step, run_config, trainer
from tests.ranks import run_ranks


def held(corpus, out, changes):
    """(most bytes that an update step's growth held, those planned)."""
    config, found = run_config(corpus, out, max_steps=5, **changes), []
    with trainer(config) as made:
        after_every_step(made, lambda step, health, update: found.append(update))
        made.fit()
    return found[2].growth_bytes, plan(config, VOCABULARY, made.world_size, "fp32").growth_bytes


@pytest.mark.parametrize(("score", "batch"), [("exact", 4), ("exact", 8), ("microbatch_norm", 8)])
def test_growth_holds_what_is_planned(corpus, tmp_path, score, batch):
    changes = {
        "global_batch_size": batch,
        "sparsity__algorithm": "rigl",
        "sparsity__structure": {"type": "block", "block": [8, 8]},
        "sparsity__storage": "compact",
        "sparsity__growth_score": score,
    }
    for measured, planned in run_ranks(2, held, corpus, str(tmp_path), changes):
        assert 0.95 * planned <= measured <= planned
