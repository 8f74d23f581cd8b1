"""The run of `configs/debug.yaml` whose losses are on record, on the small corpus."""

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparse_gpt.config_file import load_config
from tests.contracts.runs import after_every_step, trainer
from tests.ranks import ROOT, run_ranks
from tests.tiny import write_corpus

FILE = Path(__file__).with_name("debug_losses.json")


def machine() -> dict[str, str]:
    """What the last bits of a loss depend on. A CPU's name alone may hide which one it is."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    described = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in first)}
    keys = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    named = [f"{key} {described[key]}" for key in keys if key in described]
    return {
        "cpu": ", ".join(named) or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def train(corpus: str, out: str) -> dict[str, Any]:
    """Losses and gradient norms of every step, and the validation losses; runs in a rank."""
    config = load_config(
        ROOT / "configs/debug.yaml",
        [f"data=[{{path: {corpus}}}]", f"output_dir={out}", "precision=fp32"],
    )
    losses, norms = [], []
    with trainer(config) as made:

        def look(step: int, health: Any, update: Any) -> None:
            losses.append(health.loss)
            norms.append(health.grad_norm)

        after_every_step(made, look)
        made.fit()
        topology = made.controller.digest()
    records = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    validation = [r["loss"] for r in records if r["kind"] == "validation"]
    return {"losses": losses, "norms": norms, "validation": validation, "topology": topology}


def run() -> dict[str, Any]:
    """One rank of the pool, as the test runs it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "tiny")
        return run_ranks(1, train, str(corpus), str(Path(folder) / "run"))[0]
