"""What a run ends with: the loss over whole splits, written once for its last checkpoint."""

import json
from pathlib import Path

import pytest

from tests.contracts.runs import run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=2))


def ended(corpus, out, changes):
    """A start: its results, the splits it evaluated for them, and what they should be."""
    from sparse_gpt.train.results import final_results

    with trainer(run_config(corpus, out, **changes)) as made:
        made.fit()
        evaluated, evaluate = [], made.evaluate

        def counted(split, stoppable):
            assert stoppable
            evaluated.append(split)
            return evaluate(split, stoppable=stoppable)

        made.evaluate = counted
        results = final_results(made)
        losses = {split: evaluate(split).loss for split in ("val", "test")}
        return results, evaluated, losses, made.state.step


def test_results_are_of_the_last_checkpoint_and_made_once(corpus, tmp_path):
    out, changes = tmp_path / "run", {"max_steps": 4, "stop_at": 2}
    assert run_ranks(1, ended, corpus, str(out), changes)[0][0] is None
    assert not (out / "results.json").exists()
    del changes["stop_at"]
    results, evaluated, losses, _ = run_ranks(1, ended, corpus, str(out), changes)[0]
    assert evaluated == ["val", "test"]
    assert {split: results[split]["loss"] for split in losses} == losses
    assert results["steps"] == results["tested_step"] == 4
    assert results["active_weights"] == results["sparse_layer_weights"] // 4
    assert json.loads((out / "results.json").read_text()) == results
    # A start after the end takes what is written; what is of another checkpoint it makes anew.
    again = run_ranks(1, ended, corpus, str(out), changes)[0]
    assert again[0] == results and again[1] == []
    path = Path(out / "results.json")
    path.write_text(json.dumps({**results, "checkpoint_sha256": "of another"}))
    assert run_ranks(1, ended, corpus, str(out), changes)[0][:2] == (results, ["val", "test"])


def test_with_patience_the_best_checkpoint_counts(corpus, tmp_path):
    changes = {"max_steps": 20, "evaluation__every": 2, "evaluation__patience": 1}
    changes |= {"optimizer__lr": 0.2, "optimizer__grad_clip": 0}  # diverges
    results, _, losses, best = run_ranks(1, ended, corpus, str(tmp_path / "run"), changes)[0]
    assert results["stopped_early"] and results["tested_step"] == best < results["steps"] < 20
    assert {split: results[split]["loss"] for split in losses} == losses
