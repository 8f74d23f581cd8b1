"""The layouts that contracts must hold in: all of them, and a subset with every pair of values."""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

FACTORS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2, 3),
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "method": ("set", "rigl", "static"),
    "block": ((1, 1), (2, 4)),
    "offload": ("none", "cpu"),
    "mode": ("follow", "replace"),
    "persistence": (500, 10_000),
}


def valid(layout: dict[str, Any]) -> bool:
    """Whether the library supports it, and it differs from every other one kept."""
    if layout["stage"] == 0 and (layout["precision"] == "bf16" or layout["offload"] == "cpu"):
        return False
    if layout["stage"] < 3 and layout["persistence"] != FACTORS["persistence"][0]:
        return False
    return not (layout["method"] == "static" and layout["mode"] == "replace")


def every_layout() -> list[dict[str, Any]]:
    rows = (dict(zip(FACTORS, values)) for values in product(*FACTORS.values()))
    return [row for row in rows if valid(row)]


def _pairs(layout: dict[str, Any]) -> Iterator[Any]:
    return combinations(layout.items(), 2)


def pairwise() -> list[dict[str, Any]]:
    """Greedily chosen: every pair of values that can occur together occurs in some layout."""
    rows = every_layout()
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: sum(pair in missing for pair in _pairs(row)))
        missing -= set(_pairs(best))
        chosen.append(best)
    return sorted(chosen, key=lambda row: row["ranks"])


def changes(layout: dict[str, Any]) -> dict[str, Any]:
    """A layout as changes of `runs.run_config`."""
    out = {
        "precision": layout["precision"],
        "deepspeed__zero_stage": layout["stage"],
        "deepspeed__offload_optimizer": layout["offload"],
        "deepspeed__param_persistence_threshold": layout["persistence"],
        "sparsity__algorithm": layout["method"],
        "sparsity__update": {"freq": 3, "stop": 11, "mode": layout["mode"]},
        "global_batch_size": 12,
    }
    if layout["block"] != (1, 1):
        out["sparsity__structure"] = {"type": "block", "block": list(layout["block"])}
    return out


def label(layout: dict[str, Any]) -> str:
    parts = [f"{layout['ranks']}r", f"z{layout['stage']}", layout["precision"], layout["method"]]
    parts += ["block"] * (layout["block"] != (1, 1)) + ["offload"] * (layout["offload"] == "cpu")
    parts += ["replace"] * (layout["mode"] == "replace")
    parts += ["persistent"] * (layout["persistence"] != FACTORS["persistence"][0])
    return "-".join(parts)
