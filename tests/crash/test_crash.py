"""The real command, killed: in the middle of a run, of a save, of a publication; then resumed."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.crash.runs import folder_names
from tests.launcher import BIN, run_deepspeed, start_deepspeed
from tests.tiny import write_corpus

pytestmark = pytest.mark.launcher

STEPS, EVERY, RANKS = 60, 5, 2
SCRIPT, DRIVER = "launch/pretrain.py", "tests/crash/driver.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 120, 6)


def configuration(folder: Path, corpus: Path, name: str) -> Path:
    """A run with everything that could fall out of step: dropout, RigL, a schedule, saves."""
    tree = {
        "output_dir": str(folder / name),
        "data": [{"path": str(corpus)}],
        "seq_len": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "precision": "fp32",
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64, "dropout": 0.1},
        "sparsity": {"sparsity": 0.75, "algorithm": "rigl", "update": {"freq": 4}},
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 8},
        "deepspeed": {"zero_stage": 2},
        "checkpoint": {"every": EVERY, "keep_last": 2},
        "evaluation": {"every": 15, "sequences": 8},
        "logging": {"every": 1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def curve(run: Path) -> dict[tuple[str, int], tuple]:
    """Every number of the log but the timings."""
    keys = ("loss", "grad_norm", "lr", "sparsity", "churn", "tokens", "flops_spent")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(r["kind"], r["step"]): tuple(r.get(key) for key in keys) for r in records}
    assert len(found) == len(records), "a step was logged twice"
    return found


def saved_steps(run: Path) -> list[str]:
    return folder_names(run / "checkpoints")


def final_digests(run: Path) -> dict[str, str]:
    """sha256 of every tensor file of the last checkpoint: masters, moments, masks, generators."""
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """The undisturbed run, with no compiler, ninja or anything else to be found on PATH."""
    folder = tmp_path_factory.mktemp("whole")
    commands = folder / "bin"
    commands.mkdir()
    for name in ("python", "deepspeed"):
        (commands / name).symlink_to(BIN / name)
    for missing in ("c++", "g++", "cc", "ninja", "git"):
        assert shutil.which(missing, path=str(commands)) is None
    config = configuration(folder, corpus, "run")
    result = run_deepspeed(SCRIPT, [config], RANKS, env={"PATH": str(commands)})
    return folder / "run", result


def test_without_compiler_and_ninja(whole):
    run, result = whole
    assert result.returncode == 0, result.stdout
    assert saved_steps(run) == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    losses = [value[0] for (kind, _), value in sorted(curve(run).items()) if kind == "train"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


def wait_for_step(launch, run: Path, step: int) -> None:
    """Until the log has that step."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert launch.process.poll() is None, launch.output
        assert time.monotonic() < deadline, launch.output
        time.sleep(0.02)


def test_killed_three_times_the_losses_go_on_bit_for_bit(whole, tmp_path, corpus):
    config, run = configuration(tmp_path, corpus, "run"), tmp_path / "run"

    with start_deepspeed(SCRIPT, [config], RANKS) as launch:  # in the middle of the run
        wait_for_step(launch, run, 2 * EVERY + 2)
        launch.kill_all()
    killed_at = max(step for kind, step in curve(run) if kind == "train")
    assert killed_at < STEPS - 4 * EVERY, "the machine was too slow to kill it in the middle"
    newest = [name for name in saved_steps(run) if not name.endswith(".tmp")][-1]

    # In the middle of a save: five files a rank, so this is the third of the second save.
    result = run_deepspeed(DRIVER, [config], RANKS, env={"CRASH_AT": "tensors:8"})
    assert result.returncode not in (0, 2), result.stdout
    assert f"resumed    step {int(newest[5:])}" in result.stdout
    torn = [name for name in saved_steps(run) if name.endswith(".tmp")]
    assert len(torn) == 1
    assert torn[0].removesuffix(".tmp") not in saved_steps(run)
    assert list((run / "checkpoints" / torn[0]).glob("master-*"))

    # Everything written, manifest too, but not yet published.
    result = run_deepspeed(DRIVER, [config], RANKS, env={"CRASH_AT": "publish:2"})
    assert result.returncode not in (0, 2), result.stdout
    torn = [name for name in saved_steps(run) if name.endswith(".tmp")]
    assert len(torn) == 1
    assert (run / "checkpoints" / torn[0] / "manifest.json").exists()

    result = run_deepspeed(SCRIPT, [config], RANKS)
    assert result.returncode == 0, result.stdout
    assert f"resumed    step {int(torn[0].removesuffix('.tmp')[5:]) - EVERY}" in result.stdout
    assert saved_steps(run) == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    assert curve(run) == curve(whole[0])
    assert final_digests(run) == final_digests(whole[0])


def test_a_flipped_bit_in_the_newest_checkpoint_ends_the_run_by_name(whole, tmp_path, corpus):
    config, run = configuration(tmp_path, corpus, "run"), tmp_path / "run"
    shutil.copytree(whole[0], run)
    before = saved_steps(run), curve(run)
    victim = run / f"checkpoints/step-{STEPS:08d}/exp_avg-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-100] ^= 1
    victim.write_bytes(content)
    result = run_deepspeed(SCRIPT, [config], RANKS)
    assert result.returncode == 2, result.stdout
    lines = [line for line in result.stdout.splitlines() if "error: " in line]
    assert lines, result.stdout
    for part in (victim.name, victim.parent.name, "sha256"):
        assert part in lines[0]
    assert "Traceback" not in result.stdout
    assert "step 1/" not in result.stdout
    assert (saved_steps(run), curve(run)) == before
