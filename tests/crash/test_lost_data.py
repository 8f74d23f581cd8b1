"""Token files that are cut short under a run: one line that names them, not SIGBUS."""

import os
import shutil

import pytest

from sparse_gpt.errors import EXIT_FAILED, EXIT_USER_ERROR
from tests.crash.runs import RANKS, SCRIPT, curve, write_config
from tests.crash.test_crash import wait_for_step
from tests.launcher import start_deepspeed

pytestmark = pytest.mark.launcher


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_a_shard_cut_short_in_training(tmp_path, tiny, ranks):
    """Of several ranks the first to read it ends with 2, and the command perhaps with the 1 of
    one that has just lost it; no rank dies of a signal."""
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    config = write_config(tmp_path, data, max_steps=2000)
    with start_deepspeed(SCRIPT, [config], ranks) as launch:
        wait_for_step(launch, tmp_path / "run", 10)
        os.truncate(data / "train-00000.bin", 4096)
        result = launch.wait(60)
    codes = [EXIT_USER_ERROR] if ranks == 1 else [EXIT_USER_ERROR, EXIT_FAILED]
    assert result.returncode in codes, result.stdout
    assert f"error: {data}/train-00000.bin was cut short while it was in use" in result.stdout
    if ranks == 1:
        assert "Traceback" not in result.stdout
    assert max(step for _, step in curve(tmp_path / "run")) < 2000
