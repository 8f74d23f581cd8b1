"""Results folders as a runner leaves them, with losses from a formula."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

REVISION = "0123456789abcdef0123456789abcdef01234567"


def record(
    arm: str,
    seed: int,
    loss: float,
    *,
    experiment: str = "iso_flop",
    label: str | None = None,
    sparsity: float = 0.0,
    algorithm: str = "static",
    structure: dict[str, Any] | None = None,
    flops: float = 1e13,
    d_model: int = 128,
    group: str = "main",
) -> dict[str, Any]:
    """A pretraining record with test loss `loss`; noise in validation depends on the seed alone."""
    tokens = 2_000_000
    val = loss + 0.05
    curve = [
        [step, step * 4096, flops * step / 500, val + 3.0 * math.exp(-step / 120)]
        for step in range(50, 501, 50)
    ]
    settings: dict[str, Any] = {}
    if sparsity:
        settings = {"ift.member": "wide", "sparsity.sparsity": sparsity}
        settings["sparsity.algorithm"] = algorithm
        if structure:
            settings["sparsity.structure"] = structure
    return {
        "schema": 1,
        "experiment": experiment,
        "run": f"{arm}-s{seed}",
        "arm": arm,
        "label": label or arm,
        "group": group,
        "seed": seed,
        "stage": "pretrain",
        "settings": settings,
        "config_sha256": "0" * 64,
        "config": {
            "seed": seed,
            "seq_len": 128,
            "global_batch_size": 32,
            "ift": {"member": "wide" if sparsity else "none"},
            "sparsity": {
                "sparsity": sparsity,
                "algorithm": algorithm if sparsity else "static",
                "structure": structure or {"type": "unstructured"},
            },
            "optimizer": {"lr": 3e-3},
        },
        "data": {
            "novels": {
                "tokens": {"train": 9_000_000, "val": 120_000, "test": 130_000},
                "vocab_size": 2048,
                "tokenizer_sha256": "ab" * 32,
            }
        },
        "git": {"revision": REVISION, "dirty": False},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "device": "CPU",
        "threads": 1,
        "ranks": 1,
        "seconds": 480.0,
        "started": "2026-11-22T01:00:00+00:00",
        "finished": "2026-11-22T01:08:00+00:00",
        "resumed": 0,
        "model": {
            "n_layer": 4,
            "n_head": 4,
            "d_model": d_model,
            "d_ff": 4 * d_model,
            "parameters": 12 * 4 * d_model**2 + 2048 * d_model,
            "active_parameters": round(12 * 4 * d_model**2 * (1 - sparsity)) + 2048 * d_model,
            "sparsity_nominal": sparsity,
            "sparsity": sparsity,
        },
        "steps": 500,
        "tokens": tokens,
        "topology_updates": 4 if sparsity and algorithm != "static" else 0,
        "flops": {
            "spent": flops,
            "per_sequence": flops / (tokens / 128),
            "sparsified_layers_per_sequence": 0.7e13 / (tokens / 128),
            "ratio_layers": 1.0,
            "ratio_model": flops / 1e13,
        },
        "loss": {"val": val, "test": loss},
        "curve": curve,
    }


def finetuned(
    arm: str, seed: int, mode: str, loss: float, *, sparsity: float, grid: dict[str, float]
) -> dict[str, Any]:
    """A fine-tuning record."""
    tree = record(arm, seed, loss, experiment="spdf", sparsity=sparsity)
    best = min(grid, key=lambda rate: grid[rate])
    part = {"loss": loss, "token_perplexity": math.exp(loss), "word_perplexity": math.exp(loss) * 9}
    tree |= {
        "run": f"{arm}-s{seed}-finetune-{mode}",
        "stage": "finetune",
        "loss": None,
        "curve": [],
        "finetune": {
            "mode": mode,
            "lr": float(best),
            "lr_grid": grid,
            "epochs": 10,
            "tested_step": 100,
            "stopped_early": True,
            "optimizer": "fresh AdamW, zero moments",
            "schedule": "fresh cosine",
            "weights_outside_masks": 1000,
            "weights_never_active": 900,
            "val": part,
            "test": part,
        },
    }
    return tree


def leaderboard(arm: str, seed: int, score: float, *, sparsity: float) -> dict[str, Any]:
    """A leaderboard record; every column has the same score, a fraction."""
    tree = record(arm, seed, 3.0, experiment="table15", sparsity=sparsity)
    columns = ("arc", "hellaswag", "truthfulqa", "mmlu", "winogrande")
    tree |= {
        "run": f"{arm}-s{seed}-leaderboard",
        "stage": "leaderboard",
        "loss": None,
        "curve": [],
        "leaderboard": {
            "kind": "leaderboard",
            "schema": 1,
            "settings": {"shots": "leaderboard"},
            "tasks": {name: {"score": score, "stderr": 0.012} for name in columns},
            "average": {"score": score, "stderr": 0.005},
            "notes": [],
        },
    }
    return tree


def write(
    folder: Path,
    records: list[dict[str, Any]],
    *,
    plan: list[dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """A results folder of these records."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for tree in records:
        path = folder / "runs" / f"{tree['run']}.json"
        path.write_text(json.dumps(tree), encoding="utf-8")
    for name, value in (("plan", plan), ("experiment", about)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def plan_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan that these records fulfil."""
    keys = ("run", "arm", "label", "seed", "stage", "group")
    return [{key: tree[key] for key in keys} for tree in records]


ISO_FLOP = {  # arm: label, sparsity, method, mean test loss, FLOPs, seeds
    "dense": ("dense", 0.0, "static", 4.20, 1.0e13, 5),
    "static75": ("Sparse Wide 75 %, static", 0.75, "static", 4.16, 1.6e13, 5),
    "set75": ("Sparse Wide 75 %, SET", 0.75, "set", 4.10, 1.6e13, 5),
    "rigl75": ("Sparse Wide 75 %, RigL", 0.75, "rigl", 4.09, 1.62e13, 3),
    "dense_tokens": ("dense, more tokens", 0.0, "static", 4.085, 1.6e13, 3),
    "dense_wide": ("dense, wider", 0.0, "static", 4.13, 1.601e13, 3),
}


def iso_flop(folder: Path) -> Path:
    """An experiment with wins, losses and a tie, all runs there."""
    noise = np.random.default_rng(7)
    shared = 0.02 * noise.standard_normal(6)
    records = [
        record(
            arm,
            seed,
            mean + shared[seed] + 0.006 * noise.standard_normal(),
            label=label,
            sparsity=sparsity,
            algorithm=algorithm,
            flops=flops,
            d_model=256 if sparsity else 128,
        )
        for arm, (label, sparsity, algorithm, mean, flops, seeds) in ISO_FLOP.items()
        for seed in range(1, seeds + 1)
    ]
    about = {
        "title": "Sparse Wide against dense at equal FLOPs, on novels",
        "question": "Does a Sparse Wide model beat the dense one at equal FLOPs?",
        "baseline": "dense",
        "compare": [
            ["static75", "dense"],
            ["set75", "dense"],
            ["rigl75", "dense"],
            ["set75", "static75"],
            ["set75", "dense_tokens"],
            ["set75", "dense_wide"],
        ],
        "command": "python launch/experiment.py configs/experiments/small/iso_flop.yaml",
    }
    return write(folder, records, plan=plan_of(records), about=about)


def block_shape(folder: Path) -> Path:
    """Arms of several shapes, three seeds."""
    noise = np.random.default_rng(3)
    structures: dict[str, dict[str, Any]] = {
        "unstructured": {"type": "unstructured"},
        **{
            name: {"type": "block", "block": [int(side) for side in name.split("x")]}
            for name in ("4x4", "8x8", "16x16", "1x4", "16x1", "64x64")
        },
        "n1m4": {"type": "n_m", "n": 1, "m": 4},
        "n2m8t": {"type": "n_m", "n": 2, "m": 8, "transposable": True},
    }
    records = [
        record(
            f"b{name}",
            seed,
            4.1 + 0.01 * place + 0.01 * noise.standard_normal(),
            experiment="block_shape",
            label=f"RigL 75 %, {name}",
            sparsity=0.75,
            algorithm="rigl",
            structure=structure,
            d_model=256,
        )
        for place, (name, structure) in enumerate(structures.items())
        for seed in (1, 2, 3)
    ]
    about = {"title": "Which shape of blocks?", "baseline": "bunstructured"}
    return write(folder, records, plan=plan_of(records), about=about)


def spdf(folder: Path) -> Path:
    """Pretraining and both ways of fine-tuning, three seeds."""
    noise = np.random.default_rng(5)
    records = []
    for arm, sparsity in (("dense", 0.0), ("wide50", 0.5), ("wide75", 0.75)):
        for seed in (1, 2, 3):
            base = 4.2 - 0.1 * sparsity + 0.01 * noise.standard_normal()
            records.append(record(arm, seed, base, experiment="spdf", sparsity=sparsity))
            for mode in ("dense", "sparse") if sparsity else ("dense",):
                gain = 0.08 if mode == "dense" and sparsity else 0.0
                loss = base - 0.4 - gain + 0.002 * noise.standard_normal()
                grid = {"1e-3": loss + 0.02, "3e-4": loss, "1e-4": loss + 0.05}
                records.append(finetuned(arm, seed, mode, loss, sparsity=sparsity, grid=grid))
    return write(
        folder, records, plan=plan_of(records), about={"title": "SPDF", "baseline": "dense"}
    )
