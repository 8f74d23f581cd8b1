"""The leaderboard as a stage: what it asks for; a run's way from checkpoint to record."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from eval.leaderboard import build_parser
from sparse_gpt.config_file import dump_yaml
from sparse_gpt.errors import UserError
from sparse_gpt.experiment import run as runs
from sparse_gpt.experiment import runner
from sparse_gpt.experiment.identity import changes, config_tree
from sparse_gpt.experiment.leaderboard_record import leaderboard_record
from sparse_gpt.experiment.leaderboard_stage import LeaderboardRun
from sparse_gpt.experiment.plan import Planner
from sparse_gpt.experiment.record import Records
from sparse_gpt.experiment.results import Record, read
from sparse_gpt.experiment.spec import load_experiment
from sparse_gpt.experiment.stages import all_runs
from sparse_gpt.train.results import FILE as RESULTS
from tests.eval.conftest import tiny_hub  # noqa: F401
from tests.experiment.tiny import BASE, WIDE, write_experiment
from tests.hf.checkpoints import sparse_model, write_run, write_tokenizer
from tests.ranks import ROOT

TWO_RANKS: dict[str, Any] = {"ranks": 2, "base": BASE | {"micro_batch_size": 2}}


def planner(folder: Path, **keys: Any) -> Planner:
    path = write_experiment(folder, stages=[{"leaderboard": keys}])
    return Planner(load_experiment(path), folder / "work")


def planned(folder: Path, **keys: Any) -> list[Any]:
    return all_runs(planner(folder, **keys))


def test_what_is_asked_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORS", "/mirrors")
    keys = {"data": "$MIRRORS/hub", "tasks": ["arc", "mmlu"], "limit": 7, "device": "cpu"}
    before, evaluation, *others = planned(tmp_path, **keys)
    assert evaluation.after is before and [run.name for run in others] == [
        "sparse-s1",
        "sparse-s1-leaderboard",
    ]
    parsed = build_parser().parse_args(evaluation.arguments(tmp_path / "run.yaml"))
    assert parsed.folders == [f"dense-s1-leaderboard={before.folder}"]
    assert (parsed.data, parsed.limit, parsed.tasks) == (Path("/mirrors/hub"), 7, ["arc", "mmlu"])
    assert (parsed.out, parsed.device, parsed.batch_size) == (evaluation.folder, "cpu", "auto")
    assert planned(tmp_path, arms=["sparse"])[1].name == "sparse-s1"
    monkeypatch.delenv("MIRRORS")
    with pytest.raises(UserError, match=r"leaderboard.data: the variable MIRRORS is not set"):
        evaluation.arguments(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"leaderboard": {"shots": "many"}}], "shots"),
        ([{"leaderboard": {"arms": ["none"]}}], "stages.leaderboard.arms: none is no arm"),
        ([{"leaderboard": {}}, {"leaderboard": {}}], "leaderboard is given twice"),
        ([{}], "either finetune or leaderboard"),
    ],
)
def test_what_is_refused(tmp_path, stages, said):
    with pytest.raises(UserError, match=said):
        load_experiment(write_experiment(tmp_path, stages=stages))


def test_where_the_data_lies_is_no_other_evaluation(tmp_path):
    saved = json.loads(json.dumps(config_tree(planned(tmp_path, data="/here")[1].config)))
    elsewhere = planned(tmp_path, data="/there", batch_size=2, device="cpu")[1].config
    assert changes(saved, elsewhere) == []
    (change,) = changes(saved, planned(tmp_path, shots="zero")[1].config)
    assert "shots: 'leaderboard' -> 'zero'" in change


def test_a_failed_evaluation_shows_its_log(tmp_path, monkeypatch, capfd):
    """Its pretraining trains nothing (`fake_run.py`), so there is no checkpoint to evaluate."""
    script = tmp_path / "script.py"
    script.write_text("import sys; print('the data is broken'); sys.exit(3)")
    monkeypatch.setitem(runner.SCRIPTS, "pretrain", str(ROOT / "tests/experiment/fake_run.py"))
    monkeypatch.setitem(runner.SCRIPTS, "leaderboard", str(script))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "weights_of", lambda run: None)
    monkeypatch.setattr(runs, "write", lambda folder: folder / "index.html")
    path = write_experiment(tmp_path, stages=[{"leaderboard": {}}], arms={"dense": {}}, **TWO_RANKS)
    code = runs.run_experiment(path, work=tmp_path / "work", results=tmp_path / "results")
    said = capfd.readouterr().out
    assert code == 1 and "dense-s1-leaderboard FAILED: exit code 3" in said
    assert said.count("the data is broken") == 1  # one process, whatever the ranks of a run


@pytest.mark.slow
def test_from_checkpoint_to_record(tiny_hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    keys = {"shots": "zero", "tasks": ["winogrande"], "data": str(tiny_hub), "device": "cpu"}
    arms = {"dense": {}, "sparse": {"settings": WIDE}}
    path = write_experiment(tmp_path, stages=[{"leaderboard": keys}], arms=arms)
    made = Planner(load_experiment(path), tmp_path / "work")
    _, _, before, evaluation = all_runs(made)
    assert isinstance(evaluation, LeaderboardRun)
    write_run(before.folder, sparse_model())
    write_tokenizer(before.folder)
    results = {
        "checkpoint_sha256": "0" * 64,
        "steps": 12,
        "tested_step": 12,
        "tokens": 99,
        "flops_spent": 9,
        "precision": "fp32",
        "device": "cpu",
        "ranks": 1,
    }
    environment = {"python": "3.11.7 (x)", "git_revision": None, "devices": [], "threads": 1}
    (before.folder / RESULTS).write_text(json.dumps(results))
    (before.folder / "environment.json").write_text(json.dumps(environment))
    (before.folder / "metrics.jsonl").write_text("")
    records = Records(tmp_path / "results")
    show = mock.Mock()
    started = runner.Runner(
        [before, evaluation], records, made.corpora, [runner.Slot((0,))], 1, show
    )
    started.jobs[0].state = "done"
    monkeypatch.setattr(started, "_skip_done", lambda: None)
    assert started.go()
    record = records.read(evaluation.name)
    assert record is not None and record["leaderboard"]["tasks"]["winogrande"]["score"] is not None
    assert records.why_not_done(evaluation, made.corpora) is None
    assert Record.model_validate_json(json.dumps(record)).stage == "leaderboard"
    assert [r.run for r in read(records.folder).records] == [evaluation.name]
    # Again: exported anew to the same bytes, so what is finished is taken up.
    started.jobs[1].state = "queued"
    assert started.go()
    log = (evaluation.folder / "log.txt").read_text()
    assert "1 of 1 lm-eval tasks are finished" in log
    again = leaderboard_record(evaluation, made.corpora)
    assert again["leaderboard"] == record["leaderboard"]
    assert dump_yaml(evaluation.config)
