"""Plots of an experiment: learning curves, perplexity against FLOPs, paired differences."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_gpt.experiment.arms import MAIN, Arm, Comparison, arms, baseline_name
from sparse_gpt.experiment.drawing import SEEDS, Plot, Style, colour, figure, label, styles
from sparse_gpt.experiment.results import Results
from sparse_gpt.experiment.statistics import perplexity, summarise

BAND = 0.18  # opacity of the spread over seeds


def common_plots(results: Results, found: Sequence[Comparison]) -> list[Plot]:
    """The plots every experiment has as soon as there is something to draw."""
    trained = [arm for arm in arms(results, "pretrain") if arm.group == MAIN]
    base = baseline_name(results)
    style = styles(sorted((arm.name for arm in trained), key=lambda name: name != base))
    plots = []
    if found:
        plots.append(
            Plot(
                "differences",
                "Paired differences in loss",
                "Mean differences in loss with 95 % intervals, one line a comparison; "
                "left of zero the first arm is better.",
                lambda: forest(found),
            )
        )
    if any(curve(arm) for arm in trained):
        plots.append(
            Plot(
                "curves",
                "Learning curves",
                "Validation loss over tokens and over FLOPs spent; bands are one standard "
                "deviation over seeds.",
                lambda: curves(trained, style),
            )
        )
    if any(arm.losses("test") or arm.losses("val") for arm in trained):
        plots.append(
            Plot(
                "perplexity_flops",
                "Perplexity against FLOPs",
                "Final perplexity of every run over the FLOPs of the whole run; large marks are "
                "means over seeds.",
                lambda: perplexity_flops(trained, style),
            )
        )
    return plots


def curve(arm: Arm) -> list[tuple[int, int, float, float, float | None]]:
    """(step, tokens, FLOPs, mean loss, standard deviation) at steps that all seeds validated at."""
    seeds = [{p[0]: p for p in run.curve if _finite(p[3])} for run in arm.runs.values()]
    seeds = [points for points in seeds if points]
    if not seeds:
        return []
    points = []
    for step in sorted(set.intersection(*(set(points) for points in seeds))):
        here = [points[step] for points in seeds]
        summary = summarise([p[3] for p in here if p[3] is not None])
        flops = math.fsum(p[2] for p in here) / len(here)
        points.append((step, here[0][1], flops, summary.mean, summary.sd))
    return points


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def curves(trained: Sequence[Arm], style: dict[str, Style]) -> Figure:
    """Validation loss over tokens, and over FLOPs."""
    made = figure(10, 5.2)
    left, right = made.subplots(1, 2, sharey=True)
    drawn = [(arm, points) for arm in trained if (points := curve(arm))]
    for arm, points in drawn:
        _curve(left, points, lambda p: p[1] / 1e6, style[arm.name], label(arm.label))
        _curve(right, points, lambda p: p[2], style[arm.name], None)
    left.set(xlabel="tokens (millions)", ylabel="validation loss (nats a token)")
    right.set(xlabel="FLOPs spent, whole model")
    # The first validations, of nearly untrained models, would hide how the curves end.
    ends = [points[-1][3] for _, points in drawn]
    top = max(points[min(len(points) - 1, len(points) // 4)][3] for _, points in drawn)
    if top > min(ends):
        margin = 0.06 * (top - min(ends))
        left.set_ylim(min(ends) - margin, top + margin)
    made.legend(loc="outside lower center", ncols=3, fontsize="small")
    return made


def _curve(
    axes: Axes,
    points: Sequence[tuple[int, int, float, float, float | None]],
    place: Callable[[tuple[int, int, float, float, float | None]], float],
    style: Style,
    name: str | None,
) -> None:
    xs, means = [place(p) for p in points], [p[3] for p in points]
    hue = colour(style)
    axes.plot(
        xs, means, style.line, color=hue, marker=style.marker, markersize=3, lw=1.4, label=name
    )
    if all(p[4] is not None for p in points):
        low = [p[3] - (p[4] or 0) for p in points]
        high = [p[3] + (p[4] or 0) for p in points]
        axes.fill_between(xs, low, high, color=hue, alpha=BAND, lw=0)


def perplexity_flops(trained: Sequence[Arm], style: dict[str, Style]) -> Figure:
    """Final perplexity of the runs and their means over FLOPs."""
    split = "test" if any(arm.losses("test") for arm in trained) else "val"
    made = figure(9, 5)
    axes = made.subplots()
    for arm in trained:
        losses = arm.losses(split)
        if not losses:
            continue
        hue, marker = colour(style[arm.name]), style[arm.name].marker
        flops = [run.flops.spent for seed in losses if (run := arm.runs[seed]).flops]
        values = [perplexity(loss) for loss in losses.values()]
        axes.scatter(flops, values, s=14, color=hue, marker=marker, alpha=SEEDS, lw=0)
        mean = perplexity(summarise(list(losses.values())).mean)
        axes.scatter(
            [math.fsum(flops) / len(flops)], [mean], s=75, color=hue, marker=marker,
            edgecolors=axes.get_facecolor(), linewidths=0.8, label=label(arm.label), zorder=3,
        )  # fmt: skip
    low, high = axes.get_xlim()
    centre, half = (low + high) / 2, (high - low) / 2
    if half < centre / 4:  # arms of nearly equal FLOPs stand together, not spread by rounding
        axes.set_xlim(centre * 0.75, centre * 1.25)
    name = {"test": "test", "val": "validation"}[split]
    axes.set(xlabel="FLOPs of the run, whole model", ylabel=f"{name} perplexity a token")
    made.legend(loc="outside right upper", fontsize="small")
    return made


def forest(found: Sequence[Comparison]) -> Figure:
    """Mean paired differences with t intervals; filled where significant after correction."""
    names = [_pair(c.arm.title, c.against.title, c.pairs.n) for c in found]
    made = figure(9, 1.4 + 0.38 * sum(1 + 0.4 * name.count("\n") for name in names))
    axes = made.subplots()
    text = colour(Style("text", "o", "-"))
    hues = {"better": "#009E73", "worse": "#D55E00"}
    for place, comparison in enumerate(found):
        pairs = comparison.pairs
        hue = hues.get(comparison.verdict, text)
        axes.scatter(pairs.differences, [place + 0.18] * pairs.n, s=9, color=hue, alpha=SEEDS, lw=0)
        if pairs.low is not None and pairs.high is not None:
            axes.plot([pairs.low, pairs.high], [place, place], color=hue, lw=1.6)
        fill = hue if comparison.verdict in hues else axes.get_facecolor()
        axes.scatter([pairs.mean], [place], s=42, color=fill, edgecolors=hue, zorder=3)
    axes.axvline(0, color=text, lw=0.9)
    axes.set_yticks(range(len(found)), names, fontsize="small")
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference in loss (nats a token)\nleft of zero: lower loss")
    return made


def _pair(arm: str, against: str, seeds: int) -> str:
    """On one line where both names are short."""
    names = [label(arm, 60), f"− {label(against, 60)}  (n = {seeds})"]
    return ("\n" if sum(map(len, names)) > 60 else " ").join(names)
