"""The small run of these tests: its configuration, and what is compared of it."""

import json
from pathlib import Path
from typing import Any

import yaml

from sparse_gpt.train.checkpoint_folder import ID

STEPS, EVERY, RANKS = 24, 8, 2
SCRIPT, FAULTY = "launch/pretrain.py", "tests/crash/faulty.py"


def write_config(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A run in `folder`/run with everything that could fall out of step.

    Dropout, RigL, a schedule, saves, validation. `changes` replace whole sections.
    """
    tree = {
        "output_dir": str(folder / "run"),
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
        "checkpoint": {"every": EVERY},
        "evaluation": {"every": 6, "sequences": 8},
        "logging": {"every": 1},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def curve(run: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Every number of the log but the timings."""
    keys = ("loss", "grad_norm", "lr", "sparsity", "churn", "tokens", "flops_spent")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(r["kind"], r["step"]): tuple(r.get(key) for key in keys) for r in records}
    assert len(found) == len(records), "a step was logged twice"
    return found


def folder_names(checkpoints: Path) -> list[str]:
    """What lies in a folder of checkpoints, but for what tells it from another."""
    return sorted(path.name for path in checkpoints.iterdir() if path.name != ID)


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints; AssertionError where one was left half written."""
    names = folder_names(run / "checkpoints")
    assert all(name.startswith("step-") and name[5:].isdigit() for name in names), names
    return [int(name[5:]) for name in names]


def digests(run: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 of every tensor file of a checkpoint: masters, moments, masks, generators."""
    manifest = json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}
