"""The supervisor, over commands that end in every way and ranks that save slowly."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from random import Random
from types import SimpleNamespace

import psutil
import pytest

from sparse_gpt import supervise
from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD
from sparse_gpt.supervise import SECOND_REQUEST_SECONDS, Supervisor
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
# In the place of RANK: with the handlers of a real one.
SAVING_RANK = "import runpy; runpy.run_path('tests/saving_rank.py', run_name='__main__')"
# Ends with 0 as `deepspeed` does when its child is killed; by then its rank has ended, too.
LOST_LAUNCHER = """
import os, subprocess, sys, time
command = [sys.executable, "-c", f"import os, sys, time; time.sleep(1); {sys.argv[1]}"]
subprocess.Popen(command, env=os.environ | {"RANK": "0"})
time.sleep(2.5)
os._exit(0)
"""


@contextlib.contextmanager
def supervised(*command, options=(), before=()):
    mark = str(time.monotonic_ns())
    words = [*before, sys.executable, "launch/supervise.py", "--backoff", "0.05", *options]
    process = subprocess.Popen(
        [*words, "--", sys.executable, "-c", *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"SUPERVISED": mark},
        cwd=ROOT,
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
        ([EXIT_STOPPED_FOR_GOOD], ["--restart-stopped"], [EXIT_STOPPED_FOR_GOOD]),
        ([1, EXIT_STOPPED_FOR_GOOD], [], [1, EXIT_STOPPED_FOR_GOOD]),  # made after a failure
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


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in sleeps alone; no signal handlers, no processes."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    time = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(supervise, "time", time)
    monkeypatch.setattr(supervise, "heeded", list)
    monkeypatch.setattr(supervise.ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *_: 0))
    return clock


def starts_of(supervisor, clock, lasts, monkeypatch):
    """When it starts a command that fails each time, after `lasts` seconds."""
    starts = []

    def run_once(_):
        starts.append(clock.now)
        clock.now += next(lasts, 0.0)
        return 1

    monkeypatch.setattr(Supervisor, "_run_once", run_once)
    assert supervisor.run() == 1
    return starts


def test_the_pauses_double(clock, monkeypatch, capsys):
    def pauses(**options):
        starts = starts_of(Supervisor([], **options), clock, iter(()), monkeypatch)
        return [b - a for a, b in itertools.pairwise(starts)]

    assert pauses() == pytest.approx([5, 10, 20, 40, 80], abs=0.3)
    said = capsys.readouterr().err
    assert "ended with 1; restart 3 of 5 in 20 s" in said
    assert "ended with 1; not started again: 5 restarts in 60 minutes" in said
    assert pauses(restarts=8)[5:] == pytest.approx([160, 300, 300], abs=0.3)


@pytest.mark.parametrize("seed", range(20))
def test_no_window_has_more_restarts(clock, monkeypatch, seed):
    random = Random(seed)
    restarts, window = random.randint(1, 5), 600.0
    lasts = iter([random.uniform(0, 3 * window / restarts) for _ in range(40)])
    supervisor = Supervisor([], restarts=restarts, window=window)
    _, *again = starts_of(supervisor, clock, lasts, monkeypatch)
    assert len(again) >= restarts
    for first, next_one in zip(again, again[restarts:], strict=False):
        assert next_one - first >= window


def test_a_signal_reaches_the_rank_alone_and_is_final(tmp_path):
    with supervised(LAUNCHER, RANK, options=["--restart-stopped"]) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED
    assert process.said == "saved\n"


def test_signals_at_once_are_one_request_however_long_the_save_takes(tmp_path):
    seconds = SECOND_REQUEST_SECONDS + 1.5
    with supervised(LAUNCHER, SAVING_RANK, tmp_path, seconds) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED
    assert process.said.splitlines()[1:] == ["saved"]


@pytest.mark.parametrize("later", [1.05, 2.0])
def test_a_second_request_ends_a_rank_in_its_save(tmp_path, later):
    with supervised(LAUNCHER, SAVING_RANK, tmp_path, 60) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(later)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        process.wait(30)
        assert time.monotonic() - asked < SECOND_REQUEST_SECONDS
    assert process.returncode == 128 + signal.SIGINT
    assert "SIGINT again: ended at once" in process.said


def test_a_second_signal_goes_on_too(tmp_path):
    with supervised(LAUNCHER, RANK, "stuck") as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_rank_that_hears_nothing_is_killed_after_a_second_request(tmp_path):
    rank = RANK.replace("not asked or", "True or")
    with supervised(LAUNCHER, rank) as process:
        assert process.stdout.readline() == "training\n"
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(1.5)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_hangup_is_a_request_but_not_under_nohup(tmp_path):
    with supervised(LAUNCHER, SAVING_RANK, tmp_path, 0) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGHUP)
    assert process.returncode == EXIT_STOPPED
    assert "SIGHUP: the run stops after this step" in process.said
    with supervised(LAUNCHER, SAVING_RANK, tmp_path, 0, before=["nohup"]) as process:
        assert process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_STOPPED
    assert "SIGTERM: the run stops after this step" in process.said


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


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(75)", 1), ("os.kill(os.getpid(), 9)", 1), ("sys.exit(0)", 0)]
)
def test_ranks_that_have_ended_with_their_launcher_tell_whether_it_went_well(end, code):
    with supervised(LOST_LAUNCHER, end, options=["--restarts", "0"]) as process:
        pass
    assert process.returncode == code


def test_what_is_no_rank_and_outlives_its_launcher_does_not_count():
    """Trackers and compile workers are killed with the ranks whose children they are."""
    with supervised(LOST_LAUNCHER.replace('"RANK"', '"NO_RANK"'), "sys.exit(1)") as process:
        pass
    assert process.returncode == 0


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
