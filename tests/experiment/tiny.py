"""A tiny experiment on the tiny corpus: files for `load_experiment`."""

from pathlib import Path
from typing import Any

import yaml

from tests.tiny import write_corpus

BASE: dict[str, Any] = {
    "seq_len": 16,
    "micro_batch_size": 4,
    "global_batch_size": 4,
    "max_steps": 12,
    "precision": "fp32",
    "model": {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 64},
    "sparsity": {"update": {"freq": 3, "stop": 0.75}},
    "optimizer": {"lr": 0.002},
    "schedule": {"warmup_fraction": 0.25},
    "deepspeed": {"zero_stage": 0},
    "checkpoint": {"every": 4, "keep_last": 1},
    "evaluation": {"every": 4, "sequences": 8},
    "logging": {"every": 1},
}
WIDE = {"ift.member": "wide", "sparsity.sparsity": 0.75, "sparsity.algorithm": "set"}


def write_experiment(folder: Path, **changes: Any) -> Path:
    """An experiment of a dense arm and a sparse one, one seed; returns the file."""
    data = folder / "tokens"
    if not data.exists():
        write_corpus(data, documents=60, val_documents=4)
    tree = {
        "name": "tiny",
        "data": {"text": {"path": str(data)}},
        "base": BASE,
        "seeds": [1],
        "baseline": "dense",
        "arms": {"dense": {}, "sparse": {"settings": WIDE}},
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path
