"""The real command, ranks of which die or fail; the supervisor starts it again."""

import signal
import socket
import sys
import time

import psutil
import pytest

from sparse_gpt.errors import EXIT_USER_ERROR
from tests.crash.runs import (
    EVERY,
    FAULTY,
    RANKS,
    curve,
    digests,
    saved_steps,
    write_config,
)
from tests.launcher import BIN, Launch, start_deepspeed
from tests.ranks import ROOT, free_port

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
WITHIN = 60.0  # seconds on a busy machine; about 3 on an idle one


def test_a_killed_rank_is_named_and_the_others_end(tmp_path, tiny):
    config = write_config(tmp_path, tiny)
    with start_deepspeed(FAULTY, [config], RANKS, {"FAULT": "step:12:1:kill"}) as launch:
        launch.wait_for_output("FAULT kill")
        killed = time.monotonic()
        result = launch.wait(WITHIN)
        assert time.monotonic() - killed < WITHIN
    assert result.returncode == 256 - signal.SIGKILL, result.stdout
    assert f"LostRank: rank 1 on {socket.gethostname()} has ended" in result.stdout
    assert saved_steps(tmp_path / "run") == [EVERY]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["meet", "start", "engine"])
def test_a_rank_killed_in_the_start_up(tmp_path, tiny, place, rank):
    """Named once the ranks have met; before, the launcher's SIGTERM ends the others at once."""
    config, other = write_config(tmp_path, tiny), 1 - rank
    with start_deepspeed(FAULTY, [config], RANKS, {"FAULT": f"{place}:1:{rank}:kill"}) as launch:
        launch.wait_for_output("FAULT kill")
        killed = time.monotonic()
        result = launch.wait(WITHIN)
        assert time.monotonic() - killed < 25  # the launcher's SIGKILL comes after 30
        assert launch.processes() == []
    assert result.returncode == 256 - signal.SIGKILL, result.stdout
    if place == "meet":
        said = f"[rank {other}] SIGTERM: ended at once, before the ranks have met"
    else:
        said = f"rank {rank} on {socket.gethostname()} has ended, before its first step"
    assert said in result.stdout, result.stdout
    assert "saves" not in result.stdout
    assert not list((tmp_path / "run").glob("checkpoints/*")) and not list(
        tmp_path.glob("**/.probe*")
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_user_error_of_one_rank_is_said_by_all(tmp_path, tiny, rank):
    config, other = write_config(tmp_path, tiny), 1 - rank
    env = {"FAULT": f"step:12:{rank}:refuse"}
    with start_deepspeed(FAULTY, [config], RANKS, env) as launch:
        result = launch.wait(2 * WITHIN)
        assert launch.processes() == []
    assert result.returncode == EXIT_USER_ERROR, result.stdout
    named = f"rank {rank} on {socket.gethostname()} failed in step 12: an injected error"
    lines = [line for line in result.stdout.splitlines() if "error: " in line]
    prefix = {0: "", 1: "[rank 1] "}
    assert sorted(lines) == sorted(
        [f"{prefix[rank]}error: an injected error", f"{prefix[other]}error: {named}"]
    )
    assert "Traceback" not in result.stdout
    assert saved_steps(tmp_path / "run") == [EVERY]


def test_a_hung_rank_is_named_and_the_others_end(tmp_path, tiny):
    config = write_config(tmp_path, tiny, timeouts={"progress": 5.0})
    with start_deepspeed(FAULTY, [config], RANKS, {"FAULT": "step:12:1:hang"}) as launch:
        launch.wait_for_output("FAULT hang")
        result = launch.wait(2 * WITHIN)
    assert result.returncode == 1, result.stdout
    assert "step 12 has made no headway for 5 s (timeouts.progress): rank 1 on" in result.stdout
    assert "faulty.py" in result.stdout


def supervised(config, *options, **env):
    """`launch/supervise.py` over the real command."""
    command = [sys.executable, str(ROOT / "launch/supervise.py"), *options, "--"]
    command += [str(BIN / "deepspeed"), "--num_accelerators", str(RANKS)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return Launch([*command, str(ROOT / FAULTY), str(config)], env, ROOT)


@pytest.mark.parametrize("ranks_too", [False, True])
def test_a_killed_launcher_is_no_success(tmp_path, tiny, ranks_too):
    """`deepspeed` itself ends with 0 then."""
    config = write_config(tmp_path, tiny)
    with supervised(config, "--restarts", "0", FAULT="step:5:all:pause") as launch:
        launch.wait_for_output("FAULT pause")
        ranks = launch.wait_for_ranks(RANKS)
        launcher = psutil.Process(ranks[0].ppid())
        for process in [launcher, *(ranks.values() if ranks_too else ())]:
            process.kill()
        result = launch.wait(120)
        assert launch.processes() == []
    assert result.returncode == 1, result.stdout
    assert len(saved_steps(tmp_path / "run")) == (0 if ranks_too else 1)


def test_the_supervisor_starts_a_run_again_which_loses_nothing(tmp_path, tiny, undisturbed):
    """Each start is killed in its 10th step, until one has fewer to make."""
    config, run = write_config(tmp_path, tiny), tmp_path / "run"
    with supervised(config, "--backoff", "0.1", FAULT="step:10:1:kill") as launch:
        result = launch.wait(900)
        assert launch.processes() == []
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("FAULT kill") == result.stdout.count("supervise: ended with") == 2
    assert curve(run) == curve(undisturbed)
    assert digests(run) == digests(undisturbed)
