"""Engines: what one rank leaves out, and losses in chunks where weights are sharded."""

import pytest

from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks


def losses_of(corpus, out, changes, exchange=None):
    """Losses of a run; `exchange`: whether the engine is told to average gradients."""
    losses = []
    with trainer(run_config(corpus, out, max_steps=4, **changes)) as made:
        if exchange is None:
            made.engine.buffered_allreduce_fallback = None  # nobody may call it
        else:
            made.engine.enable_backward_allreduce = exchange
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
    return losses


def test_one_rank_at_stage_0_averages_nothing(corpus, tmp_path):
    stage_0 = {"deepspeed__zero_stage": 0}
    alone = run_ranks(1, losses_of, corpus, str(tmp_path / "alone"), stage_0)
    assert alone == run_ranks(1, losses_of, corpus, str(tmp_path / "other"), stage_0, True)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_in_chunks(corpus, tmp_path, stage):
    """Chunks that do not divide a micro-batch; only the order of sums differs."""
    whole = {"deepspeed__zero_stage": stage}
    runs = [
        run_ranks(2, losses_of, corpus, str(tmp_path / f"{chunk}"), changes, True)
        for chunk, changes in ((0, whole), (24, whole | {"model__loss_chunk": 24}))
    ]
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert runs[0][0] != runs[1][0]
