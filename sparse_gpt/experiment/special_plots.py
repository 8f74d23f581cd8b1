"""Plots that only some experiments have: loss by shape beside its speed, and lr grids."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.arms import MAIN, Arm, arms
from sparse_gpt.experiment.drawing import SEEDS, Plot, colour, figure, label, styles
from sparse_gpt.experiment.results import Record, Results
from sparse_gpt.experiment.statistics import summarise
from sparse_gpt.experiment.table import Cell, Table, cell
from sparse_gpt.experiment.tables import lr, spread_cell
from sparse_gpt.json_file import read_object

SPEEDS = Path(__file__).resolve().parents[2] / "docs/benchmarks/sparse_linear.json"
FEWEST_SHAPES = 3  # from here on an experiment is one about shapes


DTYPES = ("bf16", "fp32")


@dataclass(frozen=True)
class Speeds:
    """Time of sparse layers over the fastest dense one of equal FLOPs and dtype (forward, dX, dW).

    ratios: by (shape, sparsity), then by dtype. where: on what they were measured, "" on nothing.
    """

    ratios: Mapping[tuple[str, float], Mapping[str, float]]
    where: str

    def of(self, arm: Arm) -> Mapping[str, float]:
        """{dtype: ratio} of an arm's shape at its sparsity, as far as it was measured."""
        sparsity = arm.any.model.sparsity_nominal if arm.any.model else 0.0
        return self.ratios.get((shape(arm.any) or "", sparsity), {})


def shape(record: Record) -> str | None:
    """`1x1`, `16x16`, `2:8`, `2:8 transposable`; None of a dense model."""
    if record.model is None or not record.model.sparsity_nominal:
        return None
    structure = record.section("sparsity").get("structure")
    structure = structure if isinstance(structure, dict) else {}
    if structure.get("type") == "block" and isinstance(structure.get("block"), list):
        return "x".join(str(side) for side in structure["block"])
    if structure.get("type") == "n_m":
        turned = " transposable" if structure.get("transposable") else ""
        return f"{structure.get('n')}:{structure.get('m')}{turned}"
    return "1x1"


def speeds(path: Path = SPEEDS) -> Speeds:
    """GPT-3 Small's first MLP layer by the native kernels on one thread; none without a file.

    Raises `UserError` for a file that is no benchmark of sparse layers.
    """
    if not path.is_file():
        return Speeds({}, "")
    ratios: dict[tuple[str, float], dict[str, float]] = {}
    try:
        benchmark: dict[str, Any] = read_object(path)
        for row in benchmark["rows"]:
            measured = (row["shape"], row["threads"], row["kernel"]) == ("small", 1, "block_cpu")
            if measured and row["dtype"] in DTYPES:
                at = ratios.setdefault((row["block"], row["sparsity"]), {})
                at[row["dtype"]] = float(row["ratio"])
        return Speeds(ratios, f"{benchmark['setting']['cpu']}, one thread")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a result of benchmarks/sparse_linear.py ({error!r})"
        ) from None


def shaped_arms(results: Results) -> list[Arm]:
    """The sparse arms of an experiment about shapes; none of any other experiment."""
    trained = [arm for arm in arms(results, "pretrain") if arm.group == MAIN]
    sparse = [arm for arm in trained if shape(arm.any) is not None]
    return sparse if len({shape(arm.any) for arm in sparse}) >= FEWEST_SHAPES else []


def shape_table(results: Results, path: Path = SPEEDS) -> Table | None:
    """Loss by shape, the speed of the shape beside it."""
    chosen = shaped_arms(results)
    if not chosen:
        return None
    known = speeds(path)
    rows = []
    for arm in chosen:
        ratios = known.of(arm)
        rows.append(
            [
                Cell(arm.label),
                Cell(shape(arm.any) or "-"),
                cell(arm.any.model.sparsity_nominal if arm.any.model else 0.0, "{:.0%}"),
                spread_cell(arm.loss("val")),
                spread_cell(arm.loss("test")),
                *(cell(ratios.get(dtype), "{:.2f}") for dtype in DTYPES),
            ]
        )
    notes = [
        "Time: forward, dX and dW of GPT-3 Small's first MLP layer over the fastest dense one of "
        f"equal FLOPs and dtype (docs/benchmarks/sparse_linear.json; {known.where}); - where it "
        "was not measured."
        if known.where
        else "No benchmark of sparse layers was found: no times."
    ]
    header = ["arm", "shape", "sparsity", "val loss", "test loss"]
    header += [f"time over dense, {dtype}" for dtype in DTYPES]
    return Table("Loss and speed by shape", header, rows, frozenset({2, 3, 4, 5, 6}), notes)


def special_plots(results: Results, path: Path = SPEEDS) -> list[Plot]:
    """Loss by shape where arms have several shapes; lr grids where models were fine-tuned."""
    plots = []
    chosen = [arm for arm in shaped_arms(results) if arm.loss("test") or arm.loss("val")]
    if chosen:
        plots.append(
            Plot(
                "shapes",
                "Loss by shape, and how fast the shape is",
                "Loss of each shape with the standard deviation over seeds, beside the time of a "
                "layer of that shape over the fastest dense layer.",
                lambda: shapes(chosen, speeds(path)),
            )
        )
    sweeps = lr_sweeps(results)
    if sweeps:
        plots.append(
            Plot(
                "lr_sweep",
                "Learning rates of pretraining",
                "Final validation loss over the learning rate; one line for arms that differ in "
                "nothing else, small marks are seeds.",
                lambda: lr_lines(sweeps),
            )
        )
    tuned = [arm for arm in arms(results, "finetune") if grid(arm)]
    if tuned:
        plots.append(
            Plot(
                "lr_grid",
                "Learning rates of fine-tuning",
                "Validation loss over the learning rate, one line a fine-tuned arm; small marks "
                "are seeds.",
                lambda: lr_lines({arm.title: grid(arm) for arm in tuned}),
            )
        )
    return plots


def shapes(chosen: Sequence[Arm], known: Speeds) -> Figure:
    """Two panels with one line a shape: loss, and time."""
    split = "test" if all(arm.losses("test") for arm in chosen) else "val"
    made = figure(9.5, 1.5 + 0.4 * len(chosen))
    left, right = made.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    blue, hues = "#0072B2", dict(zip(DTYPES, ("#D55E00", "#E69F00"), strict=True))
    for place, arm in enumerate(chosen):
        losses = list(arm.losses(split).values())
        left.scatter(losses, [place + 0.18] * len(losses), s=9, color=blue, alpha=SEEDS, lw=0)
        summary = arm.loss(split)
        if summary is not None:
            left.errorbar(
                [summary.mean], [place], xerr=[summary.sd] if summary.sd is not None else None,
                fmt="o", color=blue, markersize=6, capsize=2,
            )  # fmt: skip
        ratios = known.of(arm)
        for offset, (dtype, shade) in zip((-0.2, 0.2), hues.items(), strict=True):
            if (ratio := ratios.get(dtype)) is None:
                continue
            right.barh([place + offset], [ratio], color=shade, height=0.38)
            right.annotate(
                f"{ratio:.2f}", (ratio, place + offset), (4, 0), textcoords="offset points",
                va="center", fontsize="x-small",
            )  # fmt: skip
        if not ratios:
            right.text(0.05, place, "not measured", va="center", fontsize="small", alpha=0.7)
    left.set_yticks(range(len(chosen)), [label(arm.label) for arm in chosen], fontsize="small")
    left.set_ylim(len(chosen) - 0.4, -0.6)
    name = {"test": "test", "val": "validation"}[split]
    left.set_xlabel(f"{name} loss (nats a token), ± sd over seeds")
    right.axvline(1, color=colour(styles([""])[""]), lw=0.9)
    most = max([ratio for arm in chosen for ratio in known.of(arm).values()], default=1)
    right.set_xlim(0, most * 1.15)
    right.set_xlabel("time over dense, equal FLOPs")
    for dtype, shade in hues.items():
        right.barh([0], [0], color=shade, label=dtype)
    right.legend(fontsize="x-small", loc="lower right")
    return made


def grid(arm: Arm) -> dict[float, list[float]]:
    """{lr: validation losses of the seeds} of a fine-tuned arm, sorted; finite ones alone."""
    found: dict[float, list[float]] = {}
    for run in arm.runs.values():
        for rate, loss in ((run.finetune and run.finetune.lr_grid) or {}).items():
            if loss is not None and math.isfinite(loss):
                found.setdefault(float(rate), []).append(loss)
    return dict(sorted(found.items()))


def lr_sweeps(results: Results) -> dict[str, dict[float, list[float]]]:
    """{name: {lr: final validation losses}} of pretraining arms that differ in lr alone."""
    lines: dict[str, dict[float, list[float]]] = {}
    names: dict[str, str] = {}
    for arm in arms(results, "pretrain"):
        rate, settings = lr(arm.any), dict(arm.any.settings)
        swept = settings.pop("optimizer.lr", None) is not None or arm.group == MAIN
        losses = list(arm.losses("val").values())
        if rate is None or not swept or not losses:
            continue
        key = json.dumps([settings, arm.any.match], sort_keys=True)
        points = lines.setdefault(key, {})
        points[rate] = [*points.get(rate, []), *losses]
        if arm.group == MAIN or key not in names:
            names[key] = arm.label
    return {
        names[key]: dict(sorted(points.items())) for key, points in lines.items() if len(points) > 1
    }


def lr_lines(lines: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """{name: {lr: losses of the seeds}} as lines over the learning rate."""
    made = figure(9, 5)
    axes = made.subplots()
    style = styles(list(lines))
    for name, points in lines.items():
        own = style[name]
        means = [summarise(list(losses)).mean for losses in points.values()]
        axes.plot(
            list(points), means, own.line, color=colour(own), marker=own.marker, markersize=5,
            label=label(name),
        )  # fmt: skip
        for rate, losses in points.items():
            axes.scatter([rate] * len(losses), losses, s=9, color=colour(own), alpha=SEEDS, lw=0)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats a token)")
    made.legend(loc="outside right upper", fontsize="small")
    return made
