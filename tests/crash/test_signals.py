"""The real command, asked to stop in every way; each phase of a run is in tests/train."""

import os
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD
from tests.crash.runs import (
    EVERY,
    FAULTY,
    RANKS,
    SCRIPT,
    STEPS,
    curve,
    digests,
    saved_steps,
    write_config,
)
from tests.launcher import run_deepspeed, start_deepspeed

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def launcher_of(launch):
    """The process that `deepspeed` starts on each node, and that starts the ranks."""
    return psutil.Process(next(iter(launch.ranks().values())).ppid())


def to_one_rank(launch, run):
    launch.kill_rank(1, signal.SIGUSR1)


def to_all_ranks(launch, run):
    for rank in (0, 1):
        launch.kill_rank(rank, signal.SIGTERM)


def to_the_group(launch, run):  # a Ctrl-C in a terminal
    os.killpg(launch.process.pid, signal.SIGINT)


def to_the_launcher(launch, run):
    launcher_of(launch).send_signal(signal.SIGTERM)


def to_the_command(launch, run):
    launch.process.send_signal(signal.SIGTERM)


def killing_the_command(launch, run):
    launch.process.kill()


def killing_the_launcher(launch, run):
    launcher_of(launch).kill()


def hanging_up(launch, run):  # a terminal that is lost
    os.killpg(launch.process.pid, signal.SIGHUP)


def a_stop_file(launch, run):
    (run / "STOP").touch()


def stopped_in(tmp_path, tiny, place, ask, expected=EXIT_STOPPED, **env):
    """Start, ask in the pause at that place, wait for all processes to end; the output."""
    config, run = write_config(tmp_path, tiny), tmp_path / "run"
    shared = set(Path("/dev/shm").iterdir())
    with start_deepspeed(FAULTY, [config], RANKS, {"FAULT": f"{place}:all:pause", **env}) as launch:
        launch.wait_for_output(f"FAULT pause in {place.split(':')[0]}")
        launch.wait_for_ranks(RANKS)
        ask(launch, run)
        assert launch.wait(120).returncode == expected, launch.output
        deadline = time.monotonic() + 60
        while launch.processes():
            assert time.monotonic() < deadline, launch.output
            time.sleep(0.05)
        output = launch.output
    assert ask is to_the_group or "Traceback" not in output, output
    assert set(Path("/dev/shm").iterdir()) <= shared
    return config, run, output


def goes_on_bit_for_bit(config, run, undisturbed):
    (run / "STOP").unlink(missing_ok=True)
    result = run_deepspeed(SCRIPT, [config], RANKS)
    assert result.returncode == 0, result.stdout
    assert saved_steps(run)[-1] == STEPS
    assert curve(run) == curve(undisturbed)
    assert digests(run) == digests(undisturbed)
    return result.stdout


@pytest.mark.parametrize(
    ("ask", "expected", "reason"),
    [
        (to_one_rank, EXIT_STOPPED, "SIGUSR1 (1 of 2 ranks)"),
        (to_all_ranks, EXIT_STOPPED, "SIGTERM (2 of 2 ranks)"),
        (a_stop_file, EXIT_STOPPED_FOR_GOOD, "the file STOP in the run folder"),
        (to_the_launcher, 1, "SIGTERM (1 of 2 ranks)"),
        (to_the_command, -signal.SIGTERM, "a lost launcher ("),
        (killing_the_command, -signal.SIGKILL, "a lost launcher ("),
        (killing_the_launcher, 0, "a lost launcher ("),
        (to_the_group, -signal.SIGINT, "SIGINT (2 of 2 ranks)"),
        (hanging_up, -signal.SIGHUP, "SIGHUP (2 of 2 ranks)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_way_to_ask(tmp_path, tiny, request, ask, expected, reason):
    config, run, output = stopped_in(tmp_path, tiny, "step:5", ask, expected)
    (line,) = [line for line in output.splitlines() if line.startswith("stopped ")]
    assert reason in line, output
    (step,) = saved_steps(run)
    assert 5 <= step < EVERY
    if ask is a_stop_file:
        assert (run / "STOP").exists()
        again = run_deepspeed(SCRIPT, [config], RANKS)
        assert again.returncode == EXIT_STOPPED_FOR_GOOD, again.stdout
        assert f"stopped    step {step} " in again.stdout and saved_steps(run) == [step]
        assert (run / "STOP").exists()
    if ask is to_one_rank:
        whole = request.getfixturevalue("undisturbed")
        assert f"resumed    step {step}" in goes_on_bit_for_bit(config, run, whole)


def test_a_second_signal_ends_at_once_and_the_last_checkpoint_stays(tmp_path, tiny):
    config, run = write_config(tmp_path, tiny), tmp_path / "run"
    with start_deepspeed(FAULTY, [config], RANKS, {"FAULT": "step:12:1:hang"}) as launch:
        launch.wait_for_output("FAULT hang")
        launch.kill_rank(0, signal.SIGTERM)
        time.sleep(2)
        assert set(launch.ranks()) == {0, 1}, "a first signal waits for the step"
        launch.kill_rank(0, signal.SIGTERM)
        deadline = time.monotonic() + 5
        while 0 in launch.ranks():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # The launcher gives the hung rank 30 s.
        assert launch.wait(90).returncode == 128 + signal.SIGTERM, launch.output
        assert "SIGTERM again: ended at once in step 12" in launch.output
    assert saved_steps(run) == [EVERY]


def test_a_deadline(tmp_path, tiny):
    at = datetime.now() + timedelta(seconds=60)
    checkpoint = {"every": EVERY, "deadline": at.isoformat(), "deadline_margin": 0.05}
    config, run = write_config(tmp_path, tiny, checkpoint=checkpoint), tmp_path / "run"
    with start_deepspeed(SCRIPT, [config, "max_steps=100000"], RANKS) as launch:
        assert launch.wait(240).returncode == EXIT_STOPPED_FOR_GOOD, launch.output
        assert "asked by the deadline (" in launch.output
    assert -3.5 <= (datetime.now() - at).total_seconds() < 60
    assert saved_steps(run)


def test_fine_tuning_stops_and_goes_on_too(tmp_path, tiny, undisturbed):
    tree = {
        "checkpoint": str(undisturbed),
        "mode": "sparse",
        "data": [{"path": str(tiny)}],
        "micro_batch_size": 2,
        "max_steps": 12,
        "precision": "fp32",
        "evaluation": {"every": 4, "patience": None, "sequences": 8},
        "logging": {"every": 1},
    }
    runs = []
    for name in ("whole", "stopped"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree | {"output_dir": str(tmp_path / name)}))
        runs.append((config, tmp_path / name))
    (whole, whole_run), (config, run) = runs
    script = "launch/finetune.py"
    assert run_deepspeed(script, [whole], RANKS).returncode == 0
    env = {"FAULT": "step:5:all:pause", "FINETUNE": "1"}
    with start_deepspeed(FAULTY, [config], RANKS, env) as launch:
        launch.wait_for_output("FAULT pause")
        launch.kill_rank(0, signal.SIGTERM)
        assert launch.wait(120).returncode == EXIT_STOPPED, launch.output
    assert saved_steps(run) == [5]
    assert run_deepspeed(script, [config], RANKS).returncode == 0
    assert curve(run) == curve(whole_run)
    assert digests(run, 12) == digests(whole_run, 12)
