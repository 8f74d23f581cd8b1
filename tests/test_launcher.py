"""The helper that runs the `deepspeed` command."""

import os
import signal
import subprocess

import psutil
import pytest

from tests.launcher import run_deepspeed, start_deepspeed

pytestmark = pytest.mark.launcher

SCRIPT = """
import os, subprocess, sys, time

rank = int(os.environ["RANK"])
mode = sys.argv[-1]
if mode == "sleep":
    if rank == 0:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    print(f"rank {rank} sleeps", flush=True)
    time.sleep(3600)
if mode == "fail" and rank == 1:
    sys.exit("rank 1 gives up")
accelerator = os.environ["DS_ACCELERATOR"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']} on {accelerator} {os.environ.get('GIVEN')}")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "ranks_script.py"
    path.write_text(SCRIPT)
    return path


def test_runs_every_rank_with_the_given_environment(script):
    done = run_deepspeed(script, ["work"], ranks=2, env={"GIVEN": "here"}, timeout=120)
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        assert f"rank {rank} of 2 on cpu here" in done.stdout


def test_a_failing_rank_gives_a_failing_command_and_its_message(script):
    done = run_deepspeed(script, ["fail"], ranks=2, timeout=120)
    assert done.returncode != 0
    assert "rank 1 gives up" in done.stdout


def test_a_timeout_kills_the_whole_tree(script):
    with start_deepspeed(script, ["sleep"], ranks=2) as launch:
        launch.wait_for_output("rank 0 sleeps")
        launch.wait_for_output("rank 1 sleeps")
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            launch.wait(timeout=0.1)
        assert str(script) in caught.value.cmd
        assert "rank 1 sleeps" in str(caught.value.output)
        assert launch.processes() == []
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(script) in line]


def test_run_deepspeed_keeps_its_timeout(script):
    with pytest.raises(subprocess.TimeoutExpired):
        run_deepspeed(script, ["sleep"], ranks=1, timeout=0.5)


def test_kill_a_rank_then_all(script):
    with start_deepspeed(script, ["sleep"], ranks=2) as launch:
        launch.wait_for_output("rank 0 sleeps")
        launch.wait_for_output("rank 1 sleeps")
        ranks = launch.wait_for_ranks(2)
        assert sorted(ranks) == [0, 1]
        assert len({process.pid for process in ranks.values()} | {launch.process.pid}) == 3
        launch.kill_rank(1)
        done = launch.wait(60)  # deepspeed's launcher ends the others
        assert done.returncode != 0
        assert psutil.wait_procs(ranks.values(), timeout=10)[1] == []


def test_orphans_are_found_and_killed(script):
    with start_deepspeed(script, ["sleep"], ranks=2) as launch:
        launch.wait_for_output("rank 0 sleeps")
        ranks = launch.wait_for_ranks(2)
        os.kill(launch.process.pid, signal.SIGKILL)
        launch.process.wait(10)
        assert launch.ranks() == ranks  # orphaned, alive
        launch.kill_all()
        assert launch.processes() == []


def test_waiting_for_what_never_comes_shows_the_output(script):
    with start_deepspeed(script, ["work"], ranks=1) as launch:
        with pytest.raises(RuntimeError, match="ended without 'never said'") as caught:
            launch.wait_for_output("never said")
        assert "rank 0 of 1" in str(caught.value)
