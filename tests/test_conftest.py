"""What the conftest promises about a whole session, shown by sessions of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_session(folder, source, **environment):
    """A pytest session on this source with the project's conftest as a plugin."""
    path = folder / "test_inner.py"
    path.write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(folder), "-ra", str(path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_tests_without_their_data_are_skipped_and_counted(tmp_path):
    source = (
        "import pytest\n"
        "def test_novels(novels): pass\n"
        "def test_hub(hub): pass\n"
        "def test_neither(): pass\n"
        "@pytest.mark.skip(reason='another reason')\n"
        "def test_other(): pass\n"
    )
    done = run_session(tmp_path, source, SPARSE_GPT_DATA=str(tmp_path / "absent"))
    assert done.returncode == 0, done.stdout
    assert "2 tests skipped for missing data (SPARSE_GPT_DATA)" in done.stdout
    assert f"needs SPARSE_GPT_DATA: {tmp_path}/absent/novels is not a folder" in done.stdout
    (tmp_path / "present/novels").mkdir(parents=True)
    (tmp_path / "present/hub").mkdir()
    done = run_session(tmp_path, source, SPARSE_GPT_DATA=str(tmp_path / "present"))
    assert "0 tests skipped for missing data" in done.stdout
    assert "3 passed, 1 skipped" in done.stdout


def test_a_session_that_leaves_things_behind_fails_and_ends_them(tmp_path):
    shared = Path(f"/dev/shm/sparse_gpt_test_{os.getpid()}")
    done = run_session(
        tmp_path,
        "import subprocess, sys, pathlib\n"
        "def test_careless():\n"
        # Through a shell that ends at once, so that init inherits it.
        "    subprocess.run(['sh', '-c', 'sleep 3600 & echo $! > pid'])\n"
        f"    pathlib.Path('{shared}').write_text('x')\n",
    )
    shared.unlink()
    assert done.returncode == 1, done.stdout
    assert "left behind by the tests: process" in done.stdout
    assert "sleep 3600" in done.stdout
    assert f"left behind by the tests: shared memory {shared}" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_session_with_ranks_ends_them(tmp_path):
    done = run_session(
        tmp_path,
        "from tests.ranks import run_ranks\n"
        "from tests.test_ranks import identity\n"
        "def test_ranks():\n"
        "    assert len(run_ranks(2, identity)) == 2\n",
    )
    assert done.returncode == 0, done.stdout
    assert "left behind" not in done.stdout


def test_another_machine_cannot_be_reached():
    with socket.socket() as client, pytest.raises(RuntimeError, match="tests use no network"):
        client.connect(("192.0.2.1", 80))


def test_this_process_computes_on_the_cpu_offline():
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
