"""Token files that are cut short under a run: one line that names them, not SIGBUS."""

import os
import shutil

import pytest

from sparse_gpt.errors import EXIT_FAILED, EXIT_USER_ERROR
from tests.crash.runs import RANKS, SCRIPT, curve, write_config
from tests.crash.test_crash import wait_for_step
from tests.launcher import ROOT, start_deepspeed

# Pretraining whose disk gives nothing any more once a file is there.
DISK = """
import errno, os, runpy, sys
real, gone = os.preadv, {gone!r}
def preadv(*args):
    if os.path.exists(gone):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real(*args)
os.preadv = preadv
runpy.run_path({script!r}, run_name="__main__")
"""
pytestmark = pytest.mark.launcher


@pytest.mark.parametrize("ranks", [1, pytest.param(RANKS, marks=pytest.mark.slow)])
def test_a_shard_cut_short_in_training(tmp_path, tiny, ranks):
    """Of several ranks the first to read it says so, and the others that it did."""
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    config = write_config(tmp_path, data, max_steps=2000)
    with start_deepspeed(SCRIPT, [config], ranks) as launch:
        wait_for_step(launch, tmp_path / "run", 10)
        os.truncate(data / "train-00000.bin", 4096)
        result = launch.wait(60)
    assert result.returncode == EXIT_USER_ERROR, result.stdout
    assert f"error: {data}/train-00000.bin was cut short while it was in use" in result.stdout
    assert "Traceback" not in result.stdout
    assert max(step for _, step in curve(tmp_path / "run")) < 2000


@pytest.mark.slow
def test_a_disk_that_fails_in_training(tmp_path, tiny):
    """The next start may find it whole: a code after which a supervisor tries."""
    gone, script = tmp_path / "gone", tmp_path / "pretrain.py"
    script.write_text(DISK.format(gone=str(gone), script=str(ROOT / SCRIPT)))
    config = write_config(tmp_path, tiny, max_steps=2000)
    with start_deepspeed(script, [config], 1) as launch:
        wait_for_step(launch, tmp_path / "run", 10)
        gone.touch()
        result = launch.wait(60)
    assert result.returncode == EXIT_FAILED, result.stdout
    assert f"error: {tiny}/" in result.stdout and "cannot be read: Input/output" in result.stdout
    assert "Traceback" not in result.stdout
