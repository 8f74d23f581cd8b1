"""Requests to stop: noticed from every source, agreed on by all ranks, and no number is lost."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from sparse_gpt.config import CheckpointConfig
from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD, Stopped, UserError
from sparse_gpt.train import signals
from sparse_gpt.train.signals import (
    REASONS,
    Command,
    StopRequests,
    code_of,
    deadline_of,
    describe,
)
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.crash.runs import folder_names
from tests.ranks import ROOT, run_ranks
from tests.tiny import write_corpus

STEPS = 8

# Processes with real signals.

# Works until it is asked to stop; with `stuck`, it never looks.
WORKER = """
import contextlib, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sparse_gpt.errors import Stopped, run_main
from sparse_gpt.train.signals import StopRequests, code_of, listen, met
def main():
    listen()
    if "alone" not in sys.argv:
        met()
    requests = StopRequests(Path(sys.argv[2]), None, True)
    requests.begin(0 if "starting" in sys.argv else 7)
    print("ready", flush=True)
    while True:
        time.sleep(0.02)
        if "stuck" not in sys.argv and any(requests.flags()):
            with contextlib.suppress(OSError):  # as a run says what it does
                print(requests.flags(), flush=True)
            code = code_of(requests.flags(), None)
            requests.end(code)
            if "saved" in sys.argv:
                time.sleep(60)
            raise Stopped("asked to", code)
run_main(main)
"""
# Starts a worker as the launcher would, and says its number.
LAUNCHER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", *sys.argv[2:]])
print(worker.pid, flush=True)
worker.wait()
"""


@contextmanager
def started(*command, **options):
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def worker(folder, *words):
    command = [sys.executable, "-c", WORKER, str(ROOT), str(folder), *words]
    with started(*command, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def ended(process):
    out, said = process.communicate(timeout=30)
    return process.returncode, out, said


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_a_request(tmp_path, number):
    with worker(tmp_path) as process:
        process.send_signal(number)
        code, out, said = ended(process)
    assert code == EXIT_STOPPED
    flags = [float(reason == number.name) for reason in REASONS]
    assert json.loads(out) == flags
    assert f"{number.name}: the run stops after this step" in said and "Traceback" not in said


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_before_the_ranks_have_met_a_signal_ends_at_once(tmp_path, number):
    with worker(tmp_path, "alone", "stuck") as process:
        process.send_signal(number)
        code, out, said = ended(process)
    assert (code, out) == (EXIT_STOPPED, "")
    text = f"{number.name}: ended at once, before the ranks have met; nothing was trained"
    assert said == f"[rank 0] {text}\n"


def test_before_the_first_step_nothing_is_said_of_a_save(tmp_path):
    with worker(tmp_path, "starting") as process:
        process.send_signal(signal.SIGTERM)
        code, _, said = ended(process)
    assert code == EXIT_STOPPED
    assert "SIGTERM: the run stops before its first step; a second" in said and "sav" not in said


def test_a_signal_passed_on_by_the_launcher_is_no_second_one(tmp_path):
    with worker(tmp_path, "stuck") as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(signals.BURST + 0.3)
        process.send_signal(signal.SIGTERM)
        code, _, said = ended(process)
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM again: ended at once in step 7" in said


def test_under_nohup_a_hangup_is_ignored_and_other_signals_are_not(tmp_path):
    command = ["nohup", sys.executable, "-c", WORKER, str(ROOT), str(tmp_path)]
    with started(*command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        code, out, _ = ended(process)
    assert code == EXIT_STOPPED
    assert json.loads(out) == [float(reason == "SIGTERM") for reason in REASONS]


def test_a_lost_terminal_is_a_request(tmp_path):
    ours, terminal = os.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(ROOT), str(tmp_path)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=take_terminal,
    ) as process:
        os.close(terminal)
        said = b""
        while b"ready\r\n" not in said:
            said += os.read(ours, 100)
        os.close(ours)
        assert process.wait(30) == EXIT_STOPPED


def test_a_signal_after_the_save_ends_at_once(tmp_path):
    with worker(tmp_path, "saved") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("[")
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == EXIT_STOPPED


def test_a_signal_is_heard_though_nobody_reads_what_is_said(tmp_path):
    with worker(tmp_path) as process:
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        flags = json.loads(process.stdout.readline())
        assert process.wait(30) == EXIT_STOPPED
    assert flags == [float(reason == "SIGTERM") for reason in REASONS]


def test_a_parent_that_cannot_be_seen_is_no_launcher(tmp_path, monkeypatch):
    def unseen(number):
        raise psutil.NoSuchProcess(number)

    monkeypatch.setattr(signals.psutil, "Process", unseen)
    monkeypatch.setattr(signals.signal, "signal", lambda *_: None)
    monkeypatch.setattr(signals.signal, "set_wakeup_fd", lambda *_, **__: -1)
    process = signals._Process()
    process.listen()
    assert not process.lost_launcher()


def test_a_stop_file_that_cannot_be_looked_for_is_not_there(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(signals.Path, "exists", broken)
    assert not any(StopRequests(tmp_path, None, first_rank=True).flags())


def test_a_stop_file(tmp_path):
    with worker(tmp_path) as process:
        (tmp_path / "STOP").touch()
        code, out, _ = ended(process)
    assert code == EXIT_STOPPED_FOR_GOOD
    assert json.loads(out)[REASONS.index("the file STOP in the run folder")] == 1.0
    assert not any(StopRequests(tmp_path, None, first_rank=False).flags())


def test_a_stop_file_in_the_folder_of_the_command(tmp_path):
    run = tmp_path / "lr-0.001"
    for folder in (run, tmp_path):
        folder.mkdir(exist_ok=True)
        assert not any(StopRequests(run, None, True, tmp_path).flags())
        (folder / "STOP").touch()
        asked = StopRequests(run, None, True, tmp_path).flags()
        assert asked == [float(reason in signals.FILES) for reason in REASONS]
        assert not any(StopRequests(run, None, False, tmp_path).flags())
        (folder / "STOP").unlink()


def test_whoever_asked_the_stop_file_decides_the_code():
    assert code_of([0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 1.0], None) == EXIT_STOPPED
    asked = [float(reason.startswith(("SIGTERM", "the file STOP"))) for reason in REASONS]
    assert sum(asked) == 2 and code_of(asked, None) == EXIT_STOPPED_FOR_GOOD


def test_a_deadline_is_final_where_it_is_a_time_of_the_calendar():
    asked = [float(reason == signals.DEADLINE) for reason in REASONS]
    for deadline in (10.0, "slurm"):
        assert code_of(asked, deadline) == EXIT_STOPPED
    assert code_of(asked, "2026-05-01T18:00:00") == EXIT_STOPPED_FOR_GOOD


def test_a_worker_whose_launcher_is_killed_asks_to_stop(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", WORKER, str(ROOT)]
    with started(*command, str(tmp_path), stderr=subprocess.DEVNULL) as launcher:
        assert launcher.stdout.readline().strip().isdigit()
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        flags = json.loads(launcher.stdout.readline())  # the worker shares that pipe
        assert flags == [float(reason == "a lost launcher") for reason in REASONS]
        assert launcher.stdout.read() == ""  # until the worker has ended


def test_a_worker_whose_launcher_is_killed_before_the_ranks_have_met_ends(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", WORKER, str(ROOT)]
    words = ("alone", "stuck")
    with started(*command, str(tmp_path), *words, stderr=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline().strip().isdigit()
        assert launcher.stdout.readline() == "ready\n"
        launcher.kill()
        assert "a lost launcher: ended at once" in launcher.communicate(timeout=30)[1]


# Deadlines.


def test_a_deadline_in_minutes_as_a_time_and_from_slurm(monkeypatch):
    assert deadline_of(None, 2, 1000.0) is None
    assert deadline_of(10, 2, 1000.0) == 1480.0
    assert deadline_of("2026-05-01T18:00+02:00", 0, 0.0) == 1777651200.0
    local = datetime(2026, 5, 1, 18).timestamp()
    assert deadline_of("2026-05-01T18:00", 1.5, 0.0) == local - 90
    monkeypatch.setenv("SLURM_JOB_END_TIME", "5000")
    assert deadline_of("slurm", 1, 0.0) == 4940.0
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    with pytest.raises(UserError, match=r"checkpoint\.deadline: slurm, but SLURM_JOB_END_TIME"):
        deadline_of("slurm", 1, 0.0)


def test_a_command_has_started_when_it_listens(tmp_path, monkeypatch):
    before = time.time()
    assert before <= signals.started() <= time.time()  # nobody listens here
    monkeypatch.setattr(signals._process, "listen", lambda: None)
    monkeypatch.setattr(signals._process, "started", None)
    signals.listen()
    listened = signals._process.started
    assert listened is not None and before <= listened <= time.time()
    monkeypatch.setattr(signals.time, "time", lambda: listened + 1000)
    assert signals.started() == Command(tmp_path).started == listened


def test_a_deadline_that_is_none_is_refused():
    with pytest.raises(ValueError, match="neither minutes nor slurm"):
        CheckpointConfig(deadline="tomorrow")
    with pytest.raises(ValueError, match="lower deadline_margin"):
        CheckpointConfig(deadline=2.0)
    with pytest.raises(ValueError, match="neither minutes nor slurm"):
        CheckpointConfig(deadline="0001-01-01T00:00")  # before the calendar of the system


def test_reasons_in_words():
    assert describe([0, 2, 0, 0, 1, 0, 0], 4) == (
        "SIGINT (2 of 4 ranks), the file STOP in the run folder (remove it first)"
    )


# Runs.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=2))


def train(corpus, out, place=None, rank=None, **changes):
    """A run of two ranks with everything in it; `rank` asks to stop when it comes to `place`."""
    import torch.distributed as dist

    from sparse_gpt.train import loop, results

    config = run_config(
        corpus,
        out,
        max_steps=STEPS,
        model__dropout=0.1,
        sparsity__algorithm="rigl",
        checkpoint__every=5,
        evaluation__every=3,
        **changes,
    )
    originals = [(loop, "evaluate"), (loop, "to_device"), (results, "describe")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in originals]
    signals._process.received.clear()
    said = []
    try:
        with trainer(config) as made:

            def asking(owner, name):
                inner = getattr(owner, name)

                def call(*args, **kwargs):
                    if dist.get_rank() == rank:
                        signals._process.received.add(signal.SIGUSR1)
                    return inner(*args, **kwargs)

                setattr(owner, name, call)

            if place is not None:
                owners = {
                    "_dry_run": made,
                    "_step": made,
                    "to_device": loop,
                    "evaluate": loop,
                    "_update": made.controller,
                    "_write": made.checkpointer,
                    "describe": results,
                }
                asking(owners[place], place)
            say = made.metrics.say
            made.metrics.say = lambda text: (said.append(text), say(text))
            try:
                made.fit()
                if config.evaluation.final:
                    results.final_results(made)
                return "ended", said
            except Stopped:
                return "stopped", said
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        signals._process.received.clear()
        signals._process.ended, signals._process.exit_code = False, EXIT_STOPPED


def curve(run):
    keys = ("kind", "step", "loss", "grad_norm", "lr", "churn", "tokens", "flops_spent")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[record.get(key) for key in keys] for record in lines]


def digests(run):
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    return manifest["state"], {name: entry["sha256"] for name, entry in manifest["files"].items()}


def saved(run):
    folder = run / "checkpoints"
    return folder_names(folder) if folder.is_dir() else []


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert [result for result, _ in run_ranks(2, train, corpus, str(run))] == ["ended"] * 2
    return curve(run), digests(run)


@pytest.mark.parametrize(
    ("place", "stops"),
    [
        pytest.param("_dry_run", [], marks=pytest.mark.slow),  # nothing is trained
        ("_step", [1]),
        ("to_device", [1]),  # between two micro-steps
        ("_update", [4]),  # it follows the exchange of step 3
        pytest.param("evaluate", [4], marks=pytest.mark.slow),  # of step 3, which ends
        ("_write", [5, 6]),  # the save of step 5 is finished
    ],
)
def test_all_ranks_stop_after_the_same_step_and_go_on_bit_for_bit(
    corpus, tmp_path, undisturbed, place, stops
):
    run, rank = tmp_path / "run", 1
    results = run_ranks(2, train, corpus, str(run), place, rank)
    assert [result for result, _ in results] == ["stopped"] * 2
    last = stops[-1] if stops else 0
    line = f"stopped    step {last}  asked by SIGUSR1 (1 of 2 ranks); start it again to go on"
    assert line in results[0][1]
    assert saved(run) == [f"step-{step:08d}" for step in stops]
    results = run_ranks(2, train, corpus, str(run))
    assert [result for result, _ in results] == ["ended"] * 2
    assert any(text.startswith(f"resumed    step {last} ") for text in results[0][1]) == bool(last)
    assert (curve(run), digests(run)) == undisturbed


def test_a_stop_in_the_evaluation_after_the_last_step(corpus, tmp_path, undisturbed):
    run = tmp_path / "run"
    results = run_ranks(2, train, corpus, str(run), "describe", 1, evaluation__final=True)
    assert [result for result, _ in results] == ["stopped"] * 2
    assert f"stopped    step {STEPS}  asked by SIGUSR1 (1 of 2 ranks)" in "\n".join(results[0][1])
    assert not (run / "results.json").exists()
    results = run_ranks(2, train, corpus, str(run), evaluation__final=True)
    assert [result for result, _ in results] == ["ended"] * 2
    assert json.loads((run / "results.json").read_text())["tested_step"] == STEPS
    assert digests(run)[1] == undisturbed[1][1]


def obey(corpus, out, at=None):
    """The exit code of a run, its steps, and whether STOP is there; it comes in step `at`."""
    steps, stop = [], Path(out) / "STOP"

    def after(step, health, update):
        steps.append(step)
        if step == at:
            stop.touch()

    seconds, signals.LOOK_SECONDS = signals.LOOK_SECONDS, 0.0
    try:
        with trainer(run_config(corpus, out, max_steps=STEPS)) as made:
            after_every_step(made, after)
            made.fit()
        code = 0
    except Stopped as stopped:
        code = stopped.code
    finally:
        signals.LOOK_SECONDS = seconds
        signals._process.ended, signals._process.exit_code = False, EXIT_STOPPED
    return code, steps, stop.exists()


def test_a_stop_file_stays_and_ends_the_next_start_before_its_first_step(corpus, tmp_path):
    """However often; the run goes on once the file is removed."""
    run = tmp_path / "run"
    stopped = run_ranks(2, obey, corpus, str(run), at=2)
    assert stopped == [(EXIT_STOPPED_FOR_GOOD, [1, 2, 3], True)] * 2
    for _ in range(2):
        stopped = run_ranks(2, obey, corpus, str(run))
        assert stopped == [(EXIT_STOPPED_FOR_GOOD, [], True)] * 2
        assert saved(run) == ["step-00000003"]
    (run / "STOP").unlink()
    assert run_ranks(2, obey, corpus, str(run)) == [(0, [4, 5, 6, 7, 8], False)] * 2


def test_a_run_with_a_stop_file_or_past_its_deadline_trains_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    for changes in ({}, {"checkpoint__deadline": "2020-01-01T00:00:00"}):
        results = run_ranks(2, train, corpus, str(run), **changes)
        assert [result for result, _ in results] == ["stopped"] * 2
        (run / "STOP").unlink(missing_ok=True)
    assert saved(run) == []
    assert os.listdir(run).count("metrics.jsonl") == 1 and curve(run) == []
