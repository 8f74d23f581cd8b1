"""Token files that are cut short under a run: one line that names them, not SIGBUS."""

import os
import shutil

import pytest

from sparse_gpt.errors import EXIT_USER_ERROR
from tests.crash.runs import RANKS, SCRIPT, curve, write_config
from tests.crash.test_crash import wait_for_step
from tests.launcher import start_deepspeed

pytestmark = pytest.mark.launcher


@pytest.mark.parametrize("ranks", [1, RANKS])
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
