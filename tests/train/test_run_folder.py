"""One process at a time in a run folder, however the one before ended."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train import run_folder
from sparse_gpt.train.run_folder import RunFolder
from tests.ranks import ROOT

# Claims a folder, says so, and keeps it until a line is read; with `fork` a child outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from sparse_gpt.train.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[2]))
folder.claim()
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    time.sleep(60)
print("claimed", flush=True)
sys.stdin.readline()
if "wait" in sys.argv:
    time.sleep(1)
folder.release()
"""


@contextmanager
def held(folder, *words):
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(folder), *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "claimed\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_in_the_folder_of_a_living_one_is_refused_by_its_name(tmp_path, capfd):
    run = tmp_path / "run"
    with held(run) as process:
        with pytest.raises(UserError, match=rf"{run} is in use by process {process.pid} on "):
            RunFolder(run, wait=0.5).claim()
        assert capfd.readouterr().err.count(f"waiting for process {process.pid} on ") == 1
        with pytest.raises(UserError, match="two runs cannot share a folder"):
            RunFolder(run, wait=0.0).claim()


def test_a_second_run_waits_for_one_that_is_ending(tmp_path):
    with held(tmp_path, "wait") as process:
        process.stdin.write("end\n")
        process.stdin.flush()
        began = time.monotonic()
        folder = RunFolder(tmp_path)
        folder.claim()
        assert 0.3 < time.monotonic() - began < 30
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    folder.release()


def test_what_a_killed_run_forked_off_does_not_keep_the_folder(tmp_path):
    with held(tmp_path, "fork") as process:
        process.kill()
        process.wait()
        folder = RunFolder(tmp_path, wait=5.0)
        folder.claim()
        folder.release()


def test_what_was_released_can_be_claimed_by_another(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.release()
    folder.release()
    with held(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(run_folder.NO_LOCKS[0], os.strerror(run_folder.NO_LOCKS[0]))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.release()
    assert "a file system without locks" in capfd.readouterr().err
