"""The supervisor, over commands that end in every way and ranks that save slowly."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sparse_gpt.errors import EXIT_STOPPED
from tests.leftovers import marked_processes
from tests.ranks import ROOT

# Ends with the codes it is given, one each time; what it was called is in a file.
CODES = """
import os, signal, sys
from pathlib import Path
log = Path(sys.argv[1])
number = len(log.read_text().split()) if log.exists() else 0
code = int(sys.argv[2:][min(number, len(sys.argv) - 3)])
log.open("a").write(f"{code} ")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# A launcher as deepspeed's, which dies of a SIGTERM, and its rank, which then takes a while.
LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=os.environ | {"RANK": "0"})
code = rank.wait()
sys.exit(code if code > 0 else 0)
"""
RANK = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *a: asked.append(1))
print("training", flush=True)
while not asked or ("stuck" in sys.argv and len(asked) < 2):
    time.sleep(0.01)
time.sleep(0.5)
print("saved", flush=True)
sys.exit(75 if len(asked) < 2 else 143)
"""


@contextlib.contextmanager
def supervised(*command, options=()):
    mark = str(time.monotonic_ns())
    words = [sys.executable, str(ROOT / "launch/supervise.py"), "--backoff", "0.05", *options]
    process = subprocess.Popen(
        [*words, "--", sys.executable, "-c", *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"SUPERVISED": mark},
        start_new_session=True,
    )
    try:
        with process:
            yield process
            out = process.communicate(timeout=60)[0]
            assert marked_processes("SUPERVISED", mark) == []
            process.said = out
    finally:
        for left in marked_processes("SUPERVISED", mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.mark.parametrize(
    ("codes", "options", "made"),
    [
        ([1, -9, 0], [], [1, -9, 0]),  # goes on until it is done
        ([2], [], [2]),  # a user's error
        ([75, 0], [], [75]),
        ([75, 0], ["--restart-stopped"], [75, 0]),
        ([1], ["--restarts", "2"], [1, 1, 1]),
        ([7], ["--restarts", "0"], [7]),
    ],
)
def test_what_is_started_again(tmp_path, codes, options, made):
    with supervised(CODES, tmp_path / "log", *codes, options=options) as process:
        pass
    assert [int(code) for code in (tmp_path / "log").read_text().split()] == made
    assert process.returncode == made[-1]
    assert process.said.count("restart ") == len(made) - 1
    assert ("not started again" in process.said) == (made == [1, 1, 1])


def test_restarts_outside_the_window_do_not_count(tmp_path):
    options = ["--restarts", "1", "--window", "0.0005"]
    with supervised(CODES, tmp_path / "log", 1, 1, 1, 0, options=options) as process:
        pass
    assert process.returncode == 0


def test_a_signal_reaches_the_rank_alone_and_is_final(tmp_path):
    with supervised(LAUNCHER, RANK, options=["--restart-stopped"]) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED
    assert process.said == "saved\n"


def test_a_second_signal_goes_on_too(tmp_path):
    with supervised(LAUNCHER, RANK, "stuck") as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_before_the_first_rank_ends_at_once(tmp_path):
    with supervised("import time; print('starting', flush=True); time.sleep(100)") as process:
        assert process.stdout.readline() == "starting\n"
        process.send_signal(signal.SIGUSR1)
    assert process.returncode == EXIT_STOPPED


def test_a_signal_between_two_starts_ends_at_once(tmp_path):
    with supervised(CODES, tmp_path / "log", 1, options=["--backoff", "60"]) as process:
        assert "in 60 s" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED


def test_ranks_that_outlive_their_launcher_may_save_and_are_no_success(tmp_path):
    launcher = LAUNCHER.replace("code = rank.wait()", "code = 0")
    rank = "import time; time.sleep(1); print('saved', flush=True)"
    with supervised(launcher, rank, options=["--restarts", "0", "--grace", "30"]) as process:
        pass
    assert process.said == "saved\n"
    assert process.returncode == 1


def test_a_command_that_is_not_there_is_said():
    command = [sys.executable, "launch/supervise.py", "--", "no-such-command"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "cannot start no-such-command: No such file" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow  # waits for what must not come
def test_nothing_outlives_it(tmp_path):
    command = "import subprocess; subprocess.Popen(['sleep', '300'])"
    with supervised(command, options=["--grace", "0.5"]) as process:
        pass
    assert process.returncode == 1
