"""Stands for launch/pretrain.py where a test is of the runner: it trains nothing, in no time.

Every start is a line of `starts` beside the run's folder. A run whose seed is 13 fails, one of seed
14 diverges; while a file `hang` lies there, runs take steps for ever.
"""

import json
import sys
import time
from pathlib import Path

import yaml

config = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(config["output_dir"])
with open(folder.parent / "starts", "a") as file:
    file.write(f"{folder.name}\n")
if config["seed"] == 13:
    print("no luck today", flush=True)
    sys.exit(3)


def line(kind: str, step: int) -> str:
    flops = 1000 * step
    return json.dumps(
        {"kind": kind, "step": step, "loss": 5.0, "tokens": 64 * step, "flops_spent": flops}
    )


environment = {
    "python": "3.11.7 (x)",
    "git_revision": None,
    "uncommitted": [],
    "devices": [],
    "threads": 1,
}
(folder / "environment.json").write_text(json.dumps(environment))
while (folder.parent / "hang").exists():
    (folder / "metrics.jsonl").write_text(line("train", 5) + "\n")
    time.sleep(0.02)
steps = config["max_steps"]
if config["seed"] == 14:
    gone = {"kind": "diverged", "step": 7, "because": "10 steps in a row"}
    (folder / "metrics.jsonl").write_text(f"{line('train', 6)}\n{json.dumps(gone)}\n")
    sys.exit(2)
(folder / "metrics.jsonl").write_text(f"{line('train', steps)}\n{line('validation', steps)}\n")
split = {"loss": 4.5, "token_perplexity": 90.0, "word_perplexity": None, "scored_tokens": 10}
results = {
    "checkpoint_sha256": "0" * 64,
    "steps": steps,
    "tested_step": steps,
    "tokens": 64 * steps,
    "flops_spent": 1000 * steps,
    "sparse_layer_weights": 0,
    "active_weights": 0,
    "precision": "fp32",
    "device": "cpu",
    "ranks": 1,
    "val": split,
    "test": split,
}
(folder / "results.json").write_text(json.dumps(results))
