"""The tables of an experiment: tidy runs.csv, arms, comparisons, and one row a run."""

import csv
import io
import math
from collections.abc import Sequence

from sparse_gpt.experiment.arms import (
    MAIN,
    Arm,
    Comparison,
    arms,
    baseline_name,
    method,
    transformation,
)
from sparse_gpt.experiment.results import Record, Results
from sparse_gpt.experiment.statistics import ALPHA, Summary, perplexity
from sparse_gpt.experiment.table import Cell, Table, cell

CSV_COLUMNS: tuple[str, ...] = (
    "experiment", "run", "arm", "label", "group", "seed", "stage", "mode", "transformation",
    "method", "sparsity_nominal", "sparsity", "n_layer", "n_head", "d_model", "d_ff", "parameters",
    "active_parameters", "lr", "steps", "tokens", "topology_updates", "flops", "flops_per_sequence",
    "flops_ratio_layers", "flops_ratio_model", "val_loss", "test_loss", "val_perplexity",
    "test_perplexity", "test_word_perplexity", "leaderboard_average", "seconds", "resumed",
    "started", "finished", "config_sha256",
)  # fmt: skip


def runs_csv(results: Results) -> str:
    """One line a run; losses in nats a token, empty where there is none."""
    groups = {run.run: run.group for run in results.plan or []}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in sorted(results.records, key=lambda r: r.run):
        group = record.group if record.group is not None else groups.get(record.run)
        writer.writerow({k: _inert(v) for k, v in _csv_row(record, group or MAIN).items()})
    return text.getvalue()


def _inert(value: object) -> object:
    """Text that no spreadsheet takes for a formula."""
    return "'" + value if isinstance(value, str) and value[:1] in "=+-@\t" and value else value


def _csv_row(record: Record, group: str) -> dict[str, object]:
    model, flops, tuned, board = record.model, record.flops, record.finetune, record.leaderboard
    val, test = record.final_loss("val"), record.final_loss("test")
    return {
        "experiment": record.experiment,
        "run": record.run,
        "arm": record.arm,
        "label": record.label,
        "group": group,
        "seed": record.seed,
        "stage": record.stage,
        "mode": record.mode,
        "transformation": transformation(record)[0],
        "method": method(record),
        **(model.model_dump(exclude={"d_embed"}) if model else {}),
        "lr": lr(record),
        "steps": record.steps,
        "tokens": record.tokens,
        "topology_updates": record.topology_updates,
        "flops": flops.spent if flops else None,
        "flops_per_sequence": flops.per_sequence if flops else None,
        "flops_ratio_layers": flops.ratio_layers if flops else None,
        "flops_ratio_model": flops.ratio_model if flops else None,
        "val_loss": val,
        "test_loss": test,
        "val_perplexity": None if val is None else perplexity(val),
        "test_perplexity": None if test is None else perplexity(test),
        "test_word_perplexity": tuned.test.word_perplexity if tuned and tuned.test else None,
        "leaderboard_average": board.average.score if board and board.average else None,
        "seconds": record.seconds,
        "resumed": record.resumed,
        "started": record.started,
        "finished": record.finished,
        "config_sha256": record.config_sha256,
    }


def lr(record: Record) -> float | None:
    """The peak learning rate."""
    if record.finetune is not None:
        return record.finetune.lr
    value = record.section("optimizer").get("lr")
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def arm_tables(results: Results, found: Sequence[Comparison]) -> list[Table]:
    """The main table of pretraining arms, one a further group, and one of fine-tuned arms."""
    tables = []
    for stage, title in (("pretrain", "Arms"), ("finetune", "Fine-tuned arms")):
        by_group: dict[str, list[Arm]] = {}
        for arm in arms(results, stage):
            by_group.setdefault(arm.group, []).append(arm)
        for group in sorted(by_group, key=lambda group: (group != MAIN, group)):
            compared = any(
                group in (c.arm.group, c.against.group) and c.arm.stage == stage for c in found
            )
            name = title if group == MAIN else f"{title}, group {group}"
            name += "" if compared or group == MAIN else " (not compared)"
            tables.append(_arm_table(results, by_group[group], found, name))
    return tables


def _arm_table(
    results: Results, members: list[Arm], found: Sequence[Comparison], title: str
) -> Table:
    base = baseline_name(results)
    against = {
        (c.arm.stage, c.arm.name, c.arm.mode): c
        for c in reversed(found)
        if c.against.name == base and c.arm.name != base
    }
    tuned = members[0].stage == "finetune"
    header = ["arm", "seeds", "parameters", "active", "FLOPs, layers", "FLOPs, model", "tokens"]
    header = [*header[:2], "lr", "epochs"] if tuned else header
    compared = any((a.stage, a.name, a.mode) in against for a in members)
    header += ["val loss", "test loss", "test perplexity"]
    header += [f"difference to {base}", "adjusted p"] if compared else []
    rows = []
    for arm in members:
        comparison = against.get((arm.stage, arm.name, arm.mode))
        row = [Cell(arm.title), seeds_cell(arm)]
        row += _tuning_cells(arm) if tuned else _size_cells(arm)
        row += [spread_cell(arm.loss("val")), spread_cell(arm.loss("test")), _perplexity(arm)]
        if compared:
            row += _difference_cells(comparison) if comparison else [Cell("-"), Cell("-")]
        rows.append(row)
    notes = [
        "Losses are nats a token: mean ± standard deviation over seeds (none with one seed). Arms "
        "with other seeds are compared by their paired differences, not by these means."
    ]
    if not tuned:
        notes.append(
            "FLOPs are ratios to the baseline's run: of the layers that are or could be sparse, "
            "and of the whole model, topology updates included."
        )
    notes.append("Perplexity is exp(mean loss) a token.")
    if compared:
        notes.append(
            f"Differences of {next(iter(against.values())).split} loss on common seeds, with 95 % "
            "t intervals; p by paired t tests, Holm-corrected over all comparisons of the "
            f"experiment; bold: below {ALPHA}."
        )
    return Table(title, header, rows, frozenset(range(2, len(header))), notes)


def ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def count_cell(value: float | None) -> Cell:
    """A large count in three digits, sorted by all of them."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value is not None and value >= size:
            return Cell(f"{value / size:.3g} {unit}", float(value))
    return cell(value, "{:.0f}")


def seeds_cell(arm: Arm) -> Cell:
    """How many seeds and which, and of how many planned."""
    done = ranges(list(arm.runs))
    of = f" of {len(arm.planned)}" if len(arm.planned) > len(arm.runs) else ""
    diverged = arm.diverged()
    lost = f"; diverged: {ranges(diverged)}" if diverged else ""
    return Cell(f"{len(arm.runs)}{of} ({done}{lost})", float(len(arm.runs)))


def _size_cells(arm: Arm) -> list[Cell]:
    model, flops = arm.any.model, arm.any.flops
    return [
        count_cell(model.parameters if model else None),
        count_cell(model.active_parameters if model else None),
        cell(flops.ratio_layers if flops else None, "{:.3f}"),
        cell(flops.ratio_model if flops else None, "{:.3f}"),
        count_cell(arm.tokens()),
    ]


def _tuning_cells(arm: Arm) -> list[Cell]:
    rates = sorted({rate for run in arm.runs.values() if (rate := lr(run)) is not None})
    epochs = {run.finetune.epochs for run in arm.runs.values() if run.finetune}
    known = sorted(number for number in epochs if number is not None)
    return [
        Cell(", ".join(f"{rate:g}" for rate in rates) or "-", rates[0] if rates else None),
        Cell(", ".join(f"{number:.3g}" for number in known) or "-", known[0] if known else None),
    ]


def spread_cell(summary: Summary | None, digits: int = 4, strong: bool = False) -> Cell:
    """Mean ± standard deviation; the mean alone of one seed."""
    if summary is None:
        return Cell("-")
    text = f"{summary.mean:.{digits}f}"
    text += "" if summary.sd is None else f" ± {summary.sd:.{digits}f}"
    return Cell(text, summary.mean, strong)


def _perplexity(arm: Arm) -> Cell:
    summary = arm.loss("test")
    return Cell("-") if summary is None else perplexity_cell(perplexity(summary.mean))


def perplexity_cell(value: float) -> Cell:
    """A perplexity with two digits."""
    return Cell("over 1e304") if math.isinf(value) else Cell(f"{value:,.2f}", value)


def interval(comparison: Comparison) -> str:
    """The mean difference with its interval, in nats a token."""
    pairs = comparison.pairs
    if pairs.low is None or pairs.high is None:
        return f"{pairs.mean:+.4f} (one pair, no interval)"
    return f"{pairs.mean:+.4f} [{pairs.low:+.4f}, {pairs.high:+.4f}]"


def _difference_cells(comparison: Comparison) -> list[Cell]:
    strong = comparison.verdict in ("better", "worse")
    return [
        Cell(interval(comparison), comparison.pairs.mean, strong),
        p_cell(comparison.p_adjusted),
    ]


def p_cell(p: float | None) -> Cell:
    """A p value; `not tested` where there is none."""
    if p is None:
        return Cell("not tested")
    return Cell("< 0.0001" if p < 1e-4 else f"{p:.4f}", p)


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Every comparison with all its figures."""
    header = [
        "arm", "against", "split", "pairs (seeds)", "FLOPs ratio", "tokens ratio",
        "difference [95 %]", "sd", "p (t)", "p (sign flip)", "adjusted p", "finding",
    ]  # fmt: skip
    rows = [
        [
            Cell(c.arm.title),
            Cell(c.against.title),
            Cell(c.split),
            Cell(f"{c.pairs.n} ({ranges(c.pairs.seeds)})", float(c.pairs.n)),
            cell(c.flops_ratio, "{:.3f}"),
            cell(c.tokens_ratio, "{:.3f}"),
            *_difference_cells(c)[:1],
            cell(c.pairs.sd, "{:.4f}"),
            p_cell(c.pairs.p),
            p_cell(c.pairs.p_sign_flip),
            p_cell(c.p_adjusted),
            Cell(FINDINGS[c.verdict]),
        ]
        for c in found
    ]
    notes = [
        "Negative differences: the first arm's loss is lower.",
        "The exact sign-flip test needs no normal distribution, but with n pairs its p is at "
        "least 2 / 2^n: 0.25 with three, 0.0625 with five. It is shown beside, not decided by.",
    ]
    return Table("Paired comparisons", header, rows, frozenset(range(4, 11)), notes)


FINDINGS = {
    "better": "lower loss",
    "worse": "higher loss",
    "undecided": "not told apart",
    "untested": "not tested",
}


def run_table(results: Results) -> Table:
    """One row a run."""
    header = [
        "run", "arm", "seed", "stage", "steps", "tokens", "FLOPs", "val loss", "test loss",
        "minutes", "finished",
    ]  # fmt: skip
    rows = []
    for record in results.records:
        stage = f"{record.stage}, {record.mode}" if record.mode else record.stage
        rows.append(
            [
                Cell(record.run),
                Cell(record.label),
                cell(record.seed),
                Cell(stage),
                cell(record.steps, "{:,}"),
                cell(record.tokens, "{:,}"),
                cell(record.flops.spent if record.flops else None, "{:.4e}"),
                cell(record.final_loss("val"), "{:.4f}"),
                cell(record.final_loss("test"), "{:.4f}"),
                cell(record.seconds / 60 if record.seconds is not None else None, "{:.1f}"),
                Cell(record.finished or "-"),
            ]
        )
    return Table("Runs", header, rows, frozenset({2, 4, 5, 6, 7, 8, 9}))
