"""kill -9 of a runner and of a run: nothing is lost but the steps since a checkpoint."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sparse_gpt.experiment.run import run_experiment
from tests.experiment.tiny import BASE, WIDE, write_experiment
from tests.ranks import ROOT, cpu_environment

STEPS, EVERY = 400, 40
OWN = ("seconds", "started", "finished", "resumed")  # of a start, not of what it computes
RUN = "sparse-s1"


def start(folder: Path) -> int:
    """A start in this process; its exit code."""
    return run_experiment(
        folder / "tiny.yaml", jobs=1, work=folder / "work", results=folder / "results"
    )


def start_elsewhere(folder: Path) -> subprocess.Popen[bytes]:
    """A start in a process that can be killed."""
    command = [sys.executable, str(ROOT / "launch/experiment.py"), str(folder / "tiny.yaml")]
    command += ["--work", str(folder / "work"), "--results", str(folder / "results")]
    environment = os.environ | cpu_environment()
    return subprocess.Popen([*command, "--jobs", "1"], env=environment, cwd=ROOT)


def wait_for_step(folder: Path, step: int) -> None:
    metrics, deadline = folder / "work/tiny" / RUN / "metrics.jsonl", time.monotonic() + 400
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < deadline, f"{RUN} did not come to step {step}"
        time.sleep(0.005)


def record(folder: Path) -> dict:
    return json.loads((folder / f"results/tiny/runs/{RUN}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_was_killed_twice_leaves_the_record_of_an_undisturbed_one(tmp_path, capfd):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        write_experiment(
            folder,
            base={**BASE, "max_steps": STEPS, "checkpoint": {"every": EVERY, "keep_last": 1}},
            arms={"sparse": {"settings": WIDE}},
            baseline="sparse",
        )
    assert start(whole) == 0

    runner = start_elsewhere(parts)
    try:
        wait_for_step(parts, 3 * EVERY)
        children = psutil.Process(runner.pid).children(recursive=True)
    finally:
        runner.kill()
        runner.wait()
    assert children and not psutil.wait_procs(children, timeout=10)[1]
    assert not (parts / "results/tiny/runs").exists()

    def kill_the_run() -> None:
        wait_for_step(parts, 6 * EVERY)
        for child in psutil.Process().children(recursive=True):
            if f"{RUN}/run.yaml" in " ".join(child.cmdline()):
                child.kill()

    watcher = threading.Thread(target=kill_the_run)
    watcher.start()
    assert start(parts) == 1
    watcher.join()
    assert f"{RUN} FAILED: exit code -9" in capfd.readouterr().out
    assert not (parts / "results/tiny/runs").exists()

    assert start(parts) == 0
    log = (parts / "work/tiny" / RUN / "log.txt").read_text()
    resumed = [int(step) for step in re.findall(r"^resumed +step (\d+)", log, re.MULTILINE)]
    # The checkpoint of the step it was killed at may not have been whole yet.
    assert len(resumed) == 2 and resumed[0] >= 2 * EVERY and resumed[1] >= 5 * EVERY
    found, wanted = record(parts), record(whole)
    assert (found["resumed"], wanted["resumed"]) == (2, 0)
    for key in wanted:
        assert key in OWN or found[key] == wanted[key], key
    assert [point[0] for point in wanted["curve"]][-1] == STEPS
    assert wanted["topology_updates"] == 99  # every 3 steps, below step 300
    assert wanted["model"]["sparsity"] == 0.75
    assert 0 < wanted["loss"]["val"] < wanted["curve"][0][3]
    assert "sparse" in (parts / "results/tiny/index.html").read_text()
