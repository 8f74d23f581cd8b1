"""What a start shows, and how long it says it will take."""

import io
from typing import Any

import pytest
from rich.console import Console

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.estimate import Estimates, duration, remaining
from sparse_gpt.experiment.plan import Planner
from sparse_gpt.experiment.processes import slots_of
from sparse_gpt.experiment.runner import Job
from sparse_gpt.experiment.show import Show, list_runs
from sparse_gpt.experiment.spec import load_experiment
from tests.experiment.tiny import write_experiment


@pytest.fixture
def runs(tmp_path):
    experiment = load_experiment(write_experiment(tmp_path, seeds=[1, 2, 3]))
    return Planner(experiment, tmp_path / "work").runs()


def test_times_come_from_the_arm_else_from_what_is_computed(runs):
    dense, sparse = runs[:2]
    estimates = Estimates()
    assert estimates.seconds(dense) is None
    estimates.learn(dense, {"seconds": 10.0})
    assert estimates.seconds(dense) == 10.0
    work = sparse.plan.masked_flops_total / dense.plan.masked_flops_total
    assert work > 2 and estimates.seconds(sparse) == pytest.approx(10 * work)
    estimates.learn(sparse, {"seconds": 12.0})
    assert estimates.seconds(sparse) == 12.0


def test_time_left_is_that_of_the_fullest_slot():
    assert remaining([5.0, 3.0, 4.0], 2) == 7.0
    assert remaining([5.0, 3.0, 4.0], 1) == 12.0
    assert remaining([], 2) == 0.0
    assert remaining([5.0, None], 2) is None
    assert [duration(s) for s in (0, 59.6, 3599, 3661, None)] == [
        *("0:00", "1:00", "59:59", "1:01:01", "?"),
    ]


def test_the_list_says_what_is_done_and_what_is_repeated(runs):
    why: dict[str, str | None] = {run.name: None if run.arm == "dense" else "" for run in runs}
    why["sparse-s2"] = "optimizer.lr: 1 -> 2"
    estimates = Estimates()
    estimates.learn(runs[0], {"seconds": 10.0})
    estimates.learn(runs[1], {"seconds": 60.0})
    lines = list_runs(runs, why, estimates, 2).splitlines()
    assert lines[1].split()[:4] == ["dense", "1,2,3", "3/3", "12"]
    assert lines[2].split()[:4] == ["sparse", "1,2,3", "0/3", "12"]
    assert lines[2].split()[-2:] == [f"{runs[1].ratio_model:.4f}", "1:00"]
    assert "sparse-s2: to be repeated: optimizer.lr: 1 -> 2" in lines
    assert lines[-1] == "6 runs, 3 done; 2:00 left on 2 side by side"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_on_a_terminal_and_lines_elsewhere(runs, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    show = Show(Estimates(), slots=2, console=console)
    jobs: list[Any] = [Job(run) for run in runs]
    show.begin(jobs)
    jobs[0].state, jobs[0].step, jobs[0].loss = "running", 5, 4.25
    jobs[0].began = 0.0
    show.started(jobs[0])
    show.update(jobs)
    record = {"seconds": 75.0, "loss": {"val": 4.5, "test": 4.75}}
    jobs[0].state = "done"
    show.finished(jobs[0], record)
    jobs[1].state = "failed"
    show.failed(jobs[1], "exit code 3", jobs[1].run.folder / "log.txt", "[red]no luck[/red]")
    show.end(jobs)
    text = out.getvalue()
    assert "dense-s1 done in 1:15: val 4.5000, test 4.7500" in text
    assert "sparse-s1 FAILED: exit code 3" in text and "[red]no luck[/red]" in text
    assert "1 of 6 runs done; failed: ['sparse-s1']" in text
    assert ("5/12" in text and "4.2500" in text and "1 more" in text) == terminal


def test_runs_get_cores_of_their_own(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 6, 9})
    cores = lambda ranks, jobs: [slot.cores for slot in slots_of(ranks, jobs)]  # noqa: E731
    assert cores(1, None) == [(3,), (5,), (6,), (9,)]
    assert cores(2, None) == [(3, 5), (6, 9)]
    assert cores(1, 2) == [(3, 5), (6, 9)]
    assert cores(1, 3) == [(3,), (5,), (6, 9)]
    # Ranks on other nodes are the launcher's affair.
    assert [s.cores for s in slots_of(64, None, ["--hostfile", "hosts"])] == [(3, 5, 6, 9)]
    assert len(slots_of(64, 2, ["--hostfile", "hosts"])) == 2
    assert cores(8, None) == [(3, 5, 6, 9)]
    assert len(cores(1, 6)) == 6


def test_runs_get_gpus_of_their_own(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert [slot.gpus for slot in slots_of(2, None)] == [("4", "5"), ("6", "7")]
    assert [slot.gpus for slot in slots_of(5, 1)] == [("4", "5", "6", "7", "8")]
    for ranks, jobs in ((6, None), (2, 3)):
        with pytest.raises(UserError, match="5 GPUs are not enough"):
            slots_of(ranks, jobs)
