"""The real command, with faults in its saves: what it says, exit code 2, and how it goes on."""

import random

import pytest

from sparse_gpt.train.checkpoint_files import list_steps
from tests.crash.runs import RANKS, SCRIPT, curve, digests, write_config
from tests.faults import tally
from tests.faults.refusals import CERTAIN
from tests.launcher import run_deepspeed

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
DRIVER = "tests/faults/driver.py"
EXPECTED = {
    "full": "No space left on device",
    "read-only": "Read-only file system",
    "gone": "gone",
}


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_deepspeed(SCRIPT, [write_config(folder, corpus)], RANKS)
    assert result.returncode == 0, result.stdout
    return folder / "run"


def run_with(folder, config, fault):
    (folder / "fault").write_text(fault)
    result = run_deepspeed(DRIVER, [config], RANKS, env={"SAVE_FAULT": str(folder / "fault")})
    assert "FAULT" in result.stdout and not (folder / "fault").exists()
    return result


def finish_as(undisturbed, config, run):
    result = run_deepspeed(SCRIPT, [config], RANKS)
    assert result.returncode == 0, result.stdout
    assert curve(run) == curve(undisturbed)
    assert digests(run) == digests(undisturbed)


@pytest.mark.parametrize("fault", ["full:1:8:2", "full:0:25:2", "read-only:0:1:2", "gone:1:9:2"])
def test_a_disk_that_fails_in_a_save_ends_the_run_with_code_2(corpus, tmp_path, undisturbed, fault):
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    what, checkpoints = fault.split(":")[0], run / "checkpoints"
    result = run_with(tmp_path, config, fault)
    assert result.returncode == 2, result.stdout
    said = [line for line in result.stdout.splitlines() if "error: " in line]
    assert {line.startswith("[rank 1] ") for line in said} == {False, True}  # both ranks say it
    for line in said:
        assert str(checkpoints) in line
        assert EXPECTED[what] in line or (what == "gone" and "No such file" in line), line
    assert "Traceback" not in result.stdout
    if what == "gone":
        (run / "away").rename(checkpoints)
    assert list_steps(checkpoints) == [8]
    finish_as(undisturbed, config, run)
    tally.add("disk faults of the real command, exit code 2")


@pytest.mark.timeout(1200)
def test_the_real_command_killed_in_saves_again_and_again(corpus, tmp_path, undisturbed):
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    generator = random.Random(7)
    for _ in range(3):
        rank = generator.randrange(RANKS)
        number = generator.randint(1, CERTAIN[rank > 0])
        result = run_with(tmp_path, config, f"kill:{rank}:{number}")
        assert result.returncode not in (0, 2, 75, 76), result.stdout
        tally.add("kills in a save of the real command")
        if "step 24/" in result.stdout:
            break
    finish_as(undisturbed, config, run)
