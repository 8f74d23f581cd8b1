"""What is run, what is skipped, what a failure and a signal do. The runs themselves train nothing
(`fake_run.py`); `test_kill.py` does it with real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.experiment import run, runner
from sparse_gpt.experiment.arms import arms as results_arms
from sparse_gpt.experiment.lock import Lock
from sparse_gpt.experiment.results import read
from tests.experiment.tiny import WIDE, write_experiment
from tests.ranks import ROOT
from tests.tiny import write_corpus


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """`start(only=..., **changes)`: one start of the tiny experiment; (exit code, output)."""
    monkeypatch.setitem(runner.SCRIPTS, "pretrain", str(ROOT / "tests/experiment/fake_run.py"))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(run, "write", lambda folder: folder / "index.html")  # takes seconds

    def started(only=(), overrides=(), jobs=1, **changes):
        path = write_experiment(tmp_path, **changes)
        code = run.run_experiment(
            path, overrides, only, jobs, work=tmp_path / "work", results=tmp_path / "results"
        )
        return code, capfd.readouterr().out

    return started


def starts(tmp_path) -> list[str]:
    return (tmp_path / "work/tiny/starts").read_text().split()


def record(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / f"results/tiny/runs/{name}.json").read_text())


def test_finished_runs_are_skipped_and_changed_ones_repeated(start, tmp_path):
    code, _ = start()
    assert code == 0 and starts(tmp_path) == ["dense-s1", "sparse-s1"]
    first = record(tmp_path, "sparse-s1")
    code, said = start()
    assert code == 0 and len(starts(tmp_path)) == 2
    assert "2 runs, 2 done" in said
    # Not of what is computed: as before.
    assert start(overrides=["base.checkpoint.every=5", "base.logging.every=2"])[0] == 0
    assert len(starts(tmp_path)) == 2
    # One arm's setting: that arm alone, and it is said why.
    sparse = {"settings": {**WIDE, "sparsity.sparsity": 0.5}}
    code, said = start(arms={"dense": {}, "sparse": sparse})
    assert starts(tmp_path)[2:] == ["sparse-s1"]
    why = "sparsity.sparsity: 0.75 -> 0.5"
    assert f"sparse-s1: its record is of another run, repeated: {why}" in said
    assert (tmp_path / "work/tiny/sparse-s1.old1/results.json").is_file()
    again = record(tmp_path, "sparse-s1")
    assert again["config_sha256"] != first["config_sha256"]
    assert again["config"]["sparsity"]["sparsity"] == 0.5
    # A record that is lost is made again; one that came with the repository needs no checkpoints.
    (tmp_path / "results/tiny/runs/dense-s1.json").unlink()
    (tmp_path / "work/tiny/sparse-s1").rename(tmp_path / "elsewhere")
    start(arms={"dense": {}, "sparse": sparse})
    assert starts(tmp_path)[3:] == ["dense-s1"]


def test_other_data_is_another_run(start, tmp_path):
    start()
    shutil.rmtree(tmp_path / "tokens")
    write_corpus(tmp_path / "tokens", documents=61, val_documents=4)
    _, said = start()
    assert starts(tmp_path)[2:] == ["dense-s1", "sparse-s1"]
    assert "data.text: other tokens" in said


def test_a_failed_run_is_shown_and_the_others_go_on(start, tmp_path):
    arms = {"dense": {"seeds": [12, 13, 15]}, "sparse": {"seeds": [13, 15], "settings": WIDE}}
    code, said = start(arms=arms, jobs=2)
    assert code == 1
    assert set(starts(tmp_path)) == {
        f"{arm}-s{s}"
        for arm, s in [("dense", 12), ("dense", 13), ("dense", 15), ("sparse", 13), ("sparse", 15)]
    }
    assert "dense-s13 FAILED: exit code 3" in said and "no luck today" in said
    assert "3 of 5 runs done; failed: ['dense-s13', 'sparse-s13']" in said
    plan = json.loads((tmp_path / "results/tiny/plan.json").read_text())
    there = {path.stem for path in (tmp_path / "results/tiny/runs").iterdir()}
    assert {planned["run"] for planned in plan} - there == {"dense-s13", "sparse-s13"}
    # What failed is tried again, nothing else.
    start(arms=arms)
    assert sorted(starts(tmp_path)[5:]) == ["dense-s13", "sparse-s13"]


def test_a_run_that_diverged_is_a_result(start, tmp_path):
    arms = {"dense": {"seeds": [1, 14]}, "sparse": {"settings": WIDE}}
    code, said = start(arms=arms)
    assert code == 0 and "dense-s14 done in" in said and "diverged: 10 steps in a row" in said
    lost = record(tmp_path, "dense-s14")
    assert (lost["loss"], lost["diverged"], lost["steps"]) == ({}, "10 steps in a row", 7)
    assert (lost["tokens"], lost["flops"]["spent"]) == (64 * 6, 6000)
    found = results_arms(read(tmp_path / "results/tiny"), "pretrain")
    (arm,) = [arm for arm in found if arm.name == "dense"]
    assert arm.diverged() == [14]
    start(arms=arms)
    assert starts(tmp_path).count("dense-s14") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": []}, "config: Input should be an object"),
        ({"seconds": None}, "a record needs seconds"),
        ({"schema": 2}, "no record of schema 1"),
    ],
)
def test_a_file_that_is_no_record_is_named(start, tmp_path, change, said):
    start()
    path = tmp_path / "results/tiny/runs/dense-s1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"dense-s1.json: {said}"):
        start()


def test_the_plan_says_which_records_are_of_other_runs(start, tmp_path):
    start()
    arms = {"dense": {}, "sparse": {"settings": {**WIDE, "sparsity.sparsity": 0.5}}}
    start(arms=arms, only=["dense"])  # the sparse one is not repeated
    plan = json.loads((tmp_path / "results/tiny/plan.json").read_text())
    assert {run["run"]: run["stale"] for run in plan} == {
        "dense-s1": None,
        "sparse-s1": "sparsity.sparsity: 0.75 -> 0.5",
    }
    assert [r.run for r in read(tmp_path / "results/tiny").records] == ["dense-s1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_and_the_start(start, tmp_path, number):
    hang = tmp_path / "work/tiny/hang"
    hang.parent.mkdir(parents=True)
    hang.touch()
    others = set(psutil.Process().children())  # ranks of other tests
    children: list[psutil.Process] = []

    def signal_once_it_runs() -> None:
        while not (tmp_path / "work/tiny/dense-s1/metrics.jsonl").exists():
            time.sleep(0.02)
        children.extend(set(psutil.Process().children()) - others)
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=signal_once_it_runs)
    watcher.start()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    code, said = start()
    watcher.join()
    assert code == 128 + number and "start again to go on" in said
    assert children and not any(child.is_running() for child in children)
    assert not (tmp_path / "results/tiny/runs").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    hang.unlink()
    code, said = start()
    assert code == 0 and "dense-s1 started, goes on from step 5 or before" in said
    assert record(tmp_path, "dense-s1")["resumed"] == 1


def test_a_second_start_is_refused_while_the_first_or_its_runs_live(tmp_path):
    work, results = tmp_path / "work", tmp_path / "results"
    first = Lock(work, [results])
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Lock(work, [tmp_path / "other results"], grace=0.0)
    with pytest.raises(UserError, match="results: in use by another start"):
        Lock(tmp_path / "other work", [results], grace=0.0)
    child = subprocess.Popen(["sleep", "60"], pass_fds=first.descriptors)
    first.release()
    with pytest.raises(UserError, match="or by its runs"):
        Lock(work, [results], grace=0.0)
    child.kill()
    child.wait()
    Lock(work, [results], grace=5.0).release()


def test_runs_die_with_a_killed_runner(tmp_path):
    """By the kernel's hand: nothing of the runner is left to do it."""
    core = min(os.sched_getaffinity(0))
    script = (
        "import sys, time; from pathlib import Path\n"
        "from sparse_gpt.experiment.processes import Processes, Slot\n"
        f"log, slot = Path({str(tmp_path)!r}) / 'log', Slot(({core},))\n"
        "Processes('tests/experiment/sleeper.py', [], 2, slot, log)\n"
        "print('started', flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    ranks = psutil.Process(parent.pid).children()
    assert len(ranks) == 2
    parent.kill()
    parent.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(gone) == 2 and not alive


@pytest.mark.parametrize(("code", "how"), [(75, "; start again"), (76, "by the file STOP")])
def test_a_run_that_was_stopped_says_how_it_goes_on(tmp_path, monkeypatch, start, code, how):
    script = tmp_path / "stopped.py"
    script.write_text(f"raise SystemExit({code})")
    monkeypatch.setitem(runner.SCRIPTS, "pretrain", str(script))
    failed, said = start()
    assert failed == 1
    assert f"dense-s1 FAILED: exit code {code}, stopped " in said and how in said
