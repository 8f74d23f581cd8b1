"""Runs side by side: validation curves over tokens and over FLOPs, and the FLOPs ledger."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_gpt.config_file import read_tree
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_objects


@dataclass(frozen=True)
class RunCurve:
    """What one run's `metrics.jsonl` says; losses in nats a token."""

    name: str
    tokens: list[int]
    flops: list[int]
    losses: list[float]
    sparsity: float
    updates: int
    iso_flop: str  # "per layer", "whole run", or "-"

    def row(self, baseline: "RunCurve") -> dict[str, Any]:
        """The table's row; `flops_ratio` and `loss_difference` are against the first run."""
        return {
            "run": self.name,
            "sparsity": self.sparsity,
            "iso_flop": self.iso_flop,
            "tokens": self.tokens[-1],
            "flops": self.flops[-1],
            "flops_ratio": self.flops[-1] / baseline.flops[-1],
            "topology_updates": self.updates,
            "validation_loss": self.losses[-1],
            "loss_difference": self.losses[-1] - baseline.losses[-1],
            "curve": [list(point) for point in zip(self.tokens, self.flops, self.losses)],
        }


def read_run(folder: Path) -> RunCurve:
    """Read a run folder. Raises `UserError` where it holds no validation yet."""
    path = folder / "metrics.jsonl"
    try:
        points, trained, updates = [], None, 0
        for record in read_objects(path):
            kind = record["kind"]
            if kind == "validation":
                points.append((record["tokens"], record["flops_spent"], float(record["loss"])))
            elif kind == "train":
                trained = record
            updates += kind == "topology"
        if not points or trained is None:
            raise UserError(f"{path}: no validation in it yet")
        tokens, flops, losses = map(list, zip(*points))
        return RunCurve(
            name=folder.name,
            tokens=tokens,
            flops=flops,
            losses=losses,
            sparsity=trained["sparsity"],
            updates=updates,
            iso_flop=_iso_flop(folder / "config.yaml"),
        )
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: it has no metrics.jsonl") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: not a log of a run ({error!r})") from None


def _iso_flop(config: Path) -> str:
    """What of a run costs as much as in the dense model, by its resolved configuration."""
    ift = read_tree(config).get("ift") if config.is_file() else {}
    ift = ift if isinstance(ift, dict) else {}
    if ift.get("member", "none") == "none":
        return "-"
    return {"layer": "per layer", "model": "whole run"}.get(ift.get("iso_flop", "layer"), "-")


def compare(folders: list[Path], out: Path) -> str:
    """Write `comparison.json`, `comparison.md` and `comparison.png`; returns the table.

    The first run is the baseline.
    """
    runs = [read_run(folder) for folder in folders]
    rows = [run.row(runs[0]) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table = markdown(rows)
    (out / "comparison.md").write_text(table, encoding="utf-8")
    plot(runs, out / "comparison.png")
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    """The ledger as a table: one seed a row, no significance is claimed."""
    lines = [
        "| run | sparsity | iso-FLOP | tokens | FLOPs | FLOPs ratio | topology updates | "
        "validation loss | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['run']} | {row['sparsity']:.2%} | {row['iso_flop']} | {row['tokens']:,} | "
        f"{row['flops']:.4e} | {row['flops_ratio']:.3f} | {row['topology_updates']} | "
        f"{row['validation_loss']:.4f} | {row['loss_difference']:+.4f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def plot(runs: list[RunCurve], path: Path) -> None:
    """Validation loss over tokens and over FLOPs spent, one line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        left.plot([count / 1e6 for count in run.tokens], run.losses, marker="o", label=run.name)
        right.plot(run.flops, run.losses, marker="o", label=run.name)
    left.set(xlabel="tokens (millions)", ylabel="validation loss (nats a token)")
    right.set(xlabel="FLOPs spent (active products, whole model)")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
