"""One process at a time in a run folder, however the one before ended."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from sparse_gpt.errors import EXIT_FAILED, InUse
from sparse_gpt.train import run_folder
from sparse_gpt.train.checkpoint_files import list_steps
from sparse_gpt.train.run_folder import RunFolder
from tests.contracts.runs import run_config, trainer
from tests.ranks import ROOT, run_ranks
from tests.tiny import write_corpus

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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_in_the_folder_of_a_living_one_is_refused_by_its_name(tmp_path, capfd):
    run = tmp_path / "run"
    with held(run) as process:
        said = RunFolder(run, wait=0.5).claim()
        assert said.startswith(f"{run} is in use by process {process.pid} on ")
        assert capfd.readouterr().err.count(f"waiting for process {process.pid} on ") == 1
        assert "two runs cannot share a folder" in RunFolder(run, wait=0.0).claim()


def test_a_second_run_waits_for_one_that_is_ending(tmp_path):
    with held(tmp_path, "wait") as process:
        process.stdin.write("end\n")
        process.stdin.flush()
        began = time.monotonic()
        folder = RunFolder(tmp_path)
        assert folder.claim() == ""
        assert 0.3 < time.monotonic() - began < 30
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    folder.release()


def test_what_a_killed_run_forked_off_does_not_keep_the_folder(tmp_path):
    with held(tmp_path, "fork") as process:
        process.kill()
        process.wait()
        folder = RunFolder(tmp_path, wait=5.0)
        assert folder.claim() == ""
        folder.release()


def test_a_lock_that_was_removed_is_taken_again_or_whose_it_is_now_is_told(tmp_path):
    folder = RunFolder(tmp_path, wait=0.0)
    assert folder.claim() == folder.check() == ""
    (tmp_path / ".lock").unlink()  # such as all that is old on a disk
    assert folder.check() == ""
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    (tmp_path / ".lock").unlink()
    with held(tmp_path) as process:
        assert f"was removed while this run used it, and now process {process.pid}" in (
            folder.check()
        )
    folder.release()


def test_a_lock_that_is_removed_while_a_run_waits_for_it_is_not_taken_for_the_folders(tmp_path):
    """The one it gets at last has no name any more; that in its place is another run's."""
    with held(tmp_path) as first:
        waiting = RunFolder(tmp_path, wait=0.0)
        waiting._lock = open(tmp_path / ".lock", "ab", buffering=0)  # noqa: SIM115
        (tmp_path / ".lock").unlink()
        with held(tmp_path) as second:
            first.kill()
            first.wait()
            assert f"in use by process {second.pid} " in waiting.claim()


def saved_without_lock(corpus, out):
    with trainer(run_config(corpus, out, stop_at=1)) as made:
        made.fit()
        with contextlib.ExitStack() as stack:
            if dist.get_rank() == 0:
                (made.run_dir / ".lock").unlink()
                stack.enter_context(held(made.run_dir))
            made.state.step = 2
            with pytest.raises(InUse, match="was removed while this run used it") as caught:
                made.save()
            return caught.value.code, list_steps(made.run_dir / "checkpoints")


def test_no_rank_of_a_run_whose_lock_another_has_saves(tmp_path):
    corpus = str(write_corpus(tmp_path / "tiny", documents=40))
    out = str(tmp_path / "run")
    assert run_ranks(2, saved_without_lock, corpus, out) == [(EXIT_FAILED, [1])] * 2


def second_run(corpus, out):
    config = run_config(corpus, out, timeouts__exchange=1.0, timeouts__progress=0.9)
    try:
        with trainer(config):
            return ""
    except InUse as error:
        return f"{error.code} {error}"


def test_every_rank_of_a_second_run_says_so_and_the_same_start_may_succeed_later(tmp_path):
    corpus, run = str(write_corpus(tmp_path / "tiny", documents=40)), tmp_path / "run"
    with held(run) as process:
        said = run_ranks(2, second_run, corpus, str(run))
    assert said[0] == said[1]
    assert said[0].startswith(f"{EXIT_FAILED} output_dir: {run} is in use by process {process.pid}")


def test_a_full_disk_does_not_come_up_again_at_the_end(tmp_path):
    """The holder's name finds no room: whoever needs room says so."""
    script = HOLDER.replace("folder = RunFolder", "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nfolder = RunFolder")  # fmt: skip
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    ended = subprocess.run(command, input="end\n", capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "claimed\n", "")


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
