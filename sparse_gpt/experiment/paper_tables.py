"""The papers' tables filled with our numbers, the published ones beside them.

Published rows follow ours, or stand in a column beside them. Models, data and budgets are the same
only in the experiments of the papers' size: each table says what the published numbers are of.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from sparse_gpt.experiment import published
from sparse_gpt.experiment.arms import MAIN, Arm, arms, method, transformation
from sparse_gpt.experiment.results import Model, Record, Results
from sparse_gpt.experiment.statistics import perplexity, summarise
from sparse_gpt.experiment.table import Cell, Table, cell
from sparse_gpt.experiment.tables import lr, seeds_cell, spread_cell

NOT_COMPARABLE = (
    "Not comparable: the published models are GPT-3 Small and Medium on the Pile or WikiText-103; "
    "ours are of other sizes, on other data and a smaller budget. Compare the signs of differences."
)


def paper_tables(results: Results) -> list[Table]:
    """Those of Tables 14 to 17, 20 and 21 that the experiment has rows for."""
    trained = [arm for arm in arms(results, "pretrain") if arm.group == MAIN]
    tuned = [arm for arm in arms(results, "finetune") if arm.group == MAIN]
    boards = [arm for arm in arms(results, "leaderboard") if arm.group == MAIN]
    tables = []
    if trained:
        tables += [sizes(trained), end_to_end(trained), recipe(trained)]
    if boards:
        tables.append(leaderboard(boards))
    if tuned:
        tables.append(spdf(tuned))
    if not _of_paper_size(trained):
        tables = [replace(table, notes=[NOT_COMPARABLE, *table.notes]) for table in tables]
    return tables


def _shape(model: Model) -> tuple[int, int, int, int]:
    return model.n_layer, model.d_model, model.d_ff, model.n_head


def _of_paper_size(trained: list[Arm]) -> bool:
    return any(a.any.model and _shape(a.any.model) == published.GPT3_SMALL for a in trained)


def sizes(trained: list[Arm]) -> Table:
    """Tables 14 and 16: ours, then the published rows."""
    header = [
        "model", "transformation", "method", "sparsity", "sparsity, counted",
        "n_layer", "d_model", "d_ff", "n_head", "d_head",
    ]  # fmt: skip
    rows = []
    for arm in trained:
        model = arm.any.model
        assert model is not None, "the reader refuses pretraining records without a model"
        kind, sparsity = transformation(arm.any)
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                Cell(method(arm.any)),
                cell(sparsity, "{:.0%}"),
                cell(model.sparsity, "{:.2%}"),
                cell(model.n_layer),
                cell(model.d_model),
                cell(model.d_ff),
                cell(model.n_head),
                cell(model.d_model / model.n_head, "{:g}"),
            ]
        )
    for row in published.SIZES:
        counts = (row.n_layer, row.d_model, row.d_ff, row.n_head, row.d_head)
        rows.append(
            [
                Cell(f"published: {row.model}"),
                Cell(row.transformation),
                Cell("-"),
                cell(row.sparsity, "{:.0%}"),
                Cell("-"),
                *(cell(count) for count in counts),
            ]
        )
    notes = [
        f"Published: {published.SIZES_SOURCE}. It prints a d_head of 64 in all rows; the FLOPs of "
        "Table 17 say d_model / n_head, 91 and 128 in the sparse ones."
    ]
    return Table("Tables 14 and 16: sizes", header, rows, frozenset(range(3, 10)), notes)


def end_to_end(trained: list[Arm]) -> Table:
    """Table 17: ours, then the published rows."""
    header = [
        "model", "transformation", "sparsity", "sequences", "FLOPs a sequence", "total FLOPs",
        "seeds", "perplexity a token", "perplexity a word",
    ]  # fmt: skip
    rows = []
    for arm in trained:
        kind, sparsity = transformation(arm.any)
        tokens = [perplexity(loss) for loss in arm.losses("test").values()]
        words = [r.word_perplexity.test for r in arm.runs.values() if r.word_perplexity]
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                cell(sparsity, "{:.0%}"),
                cell(_sequences(arm.any), "{:,.0f}"),
                cell(arm.any.flops.per_sequence if arm.any.flops else None, "{:.4e}"),
                cell(arm.flops(), "{:.4e}"),
                seeds_cell(arm),
                _over_seeds(tokens),
                _over_seeds(words),
            ]
        )
    for row in published.END_TO_END:
        rows.append(
            [
                Cell(f"published: {row.model}"),
                Cell(row.transformation),
                cell(row.sparsity, "{:.0%}"),
                cell(row.sequences, "{:,.0f}"),
                cell(row.flops_per_sequence, "{:.4e}"),
                cell(row.flops, "{:.4e}"),
                Cell("3", 3.0),
                Cell(f"{row.perplexity} ± {row.spread}", row.perplexity),
                Cell("-"),
            ]
        )
    notes = [
        "Ours: test perplexity, mean ± standard deviation over seeds.",
        f"Published: {published.END_TO_END_SOURCE}.",
    ]
    numeric = frozenset({2, 3, 4, 5, 7, 8})
    return Table("Table 17: training FLOPs and perplexity", header, rows, numeric, notes)


def _sequences(record: Record) -> float | None:
    length = record.config.get("seq_len")
    if record.tokens is None or not isinstance(length, int) or length < 1:
        return None
    return record.tokens / length


def _over_seeds(values: Sequence[float | None]) -> Cell:
    """Mean and spread of those that are there and finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return spread_cell(summarise(known) if known else None, 2)


def recipe(trained: list[Arm]) -> Table:
    """Table 20: ours, and the published row last."""
    header = [
        "model", "parameters", "active", "n_layer", "d_model", "n_head", "batch", "lr", "tokens",
    ]  # fmt: skip
    rows = []
    for arm in trained:
        model, batch = arm.any.model, arm.any.config.get("global_batch_size")
        assert model is not None, "the reader refuses pretraining records without a model"
        rows.append(
            [
                Cell(arm.label),
                cell(model.parameters, "{:,}"),
                cell(model.active_parameters, "{:,}"),
                cell(model.n_layer),
                cell(model.d_model),
                cell(model.n_head),
                cell(batch if isinstance(batch, int) else None),
                cell(lr(arm.any), "{:g}"),
                cell(arm.tokens(), "{:,.0f}"),
            ]
        )
    row = published.RECIPE
    rows.append(
        [
            Cell(f"published: {row.model}"),
            Cell(row.parameters, 125e6),
            Cell("-"),
            cell(row.n_layer),
            cell(row.d_model),
            cell(row.n_head),
            cell(row.batch),
            cell(row.lr, "{:g}"),
            cell(row.tokens, "{:,.0f}"),
        ]
    )
    notes = [f"Published: {published.RECIPE_SOURCE}."]
    return Table("Table 20: pretraining", header, rows, frozenset(range(1, 9)), notes)


def leaderboard(boards: list[Arm]) -> Table:
    """Table 15, in percent: ours over seeds (one: ± lm-eval's standard error), then published."""
    header = ["model", "transformation", "sparsity", "method", "shots", "seeds"]
    header += [*published.COLUMNS.values(), "average"]
    rows = []
    for arm in boards:
        kind, sparsity = transformation(arm.source)
        board = arm.any.leaderboard
        shots = board.settings.get("shots") if board else None
        row = [Cell(arm.label), Cell(kind), cell(sparsity, "{:.0%}"), Cell(method(arm.source))]
        row += [Cell(str(shots) if isinstance(shots, str | int) else "-"), seeds_cell(arm)]
        row += [_score(arm, column) for column in [*published.COLUMNS, "average"]]
        rows.append(row)
    for line in published.LEADERBOARD:
        row = [Cell("published"), Cell(line.transformation), cell(line.sparsity, "{:.0%}")]
        row += [Cell("SET" if line.sparsity else "-"), Cell("-"), Cell("1", 1.0)]
        row += [cell(line.scores[column], "{:.1f}") for column in published.COLUMNS]
        rows.append([*row, cell(line.average, "{:.1f}")])
    notes = [
        "Percent. Ours: mean ± standard deviation over seeds; of one seed, ± lm-eval's standard "
        "error over documents (s.e.).",
        f"Published: {published.LEADERBOARD_SOURCE}.",
    ]
    evaluations = [run.leaderboard for arm in boards for run in arm.runs.values()]
    notes += dict.fromkeys(n for board in evaluations if board for n in board.notes)
    numeric = frozenset({2, *range(6, 12)})
    return Table("Table 15: Open LLM Leaderboard", header, rows, numeric, notes)


def finetuning(results: Results) -> Table | None:
    """What fine-tuning did with optimizer, schedule and masks; None where there was none."""
    header = [
        "arm", "optimizer", "schedule", "epochs", "lr by seed", "tested step", "stopped early",
        "weights outside the masks", "of them never active",
    ]  # fmt: skip
    rows = []
    for arm in arms(results, "finetune"):
        tuned = [run.finetune for run in arm.runs.values() if run.finetune]
        rows.append(
            [
                Cell(arm.title),
                _each([part.optimizer for part in tuned]),
                _each([part.schedule for part in tuned]),
                _each([f"{part.epochs:.3g}" for part in tuned if part.epochs is not None]),
                _each([f"{part.lr:g}" for part in tuned]),
                _each([part.tested_step for part in tuned]),
                _each([part.stopped_early for part in tuned]),
                _each([part.weights_outside_masks for part in tuned]),
                _each([part.weights_never_active for part in tuned]),
            ]
        )
    notes = ["Each value once, in the order of the seeds; - where it was not recorded."]
    return Table("What fine-tuning changed", header, rows, notes=notes) if rows else None


def _each(values: Sequence[object]) -> Cell:
    names = {True: "yes", False: "no", None: "-"}
    texts = [
        names[v] if v is None or isinstance(v, bool) else f"{v:,}" if isinstance(v, int) else str(v)
        for v in values
    ]
    return Cell(", ".join(dict.fromkeys(texts)) or "-")


def _score(arm: Arm, column: str) -> Cell:
    boards = [run.leaderboard for run in arm.runs.values() if run.leaderboard]
    scores = [b.average if column == "average" else b.tasks.get(column) for b in boards]
    known = [s for s in scores if s is not None and s.score is not None]
    values = [100 * s.score for s in known if s.score is not None]
    if not values:
        return Cell("-")
    if len(values) == 1 and known[0].stderr is not None:
        return Cell(f"{values[0]:.1f} ± {100 * known[0].stderr:.1f} s.e.", values[0])
    return spread_cell(summarise(values), 1)


def spdf(tuned: list[Arm]) -> Table:
    """Table 21, one row a number of it."""
    header = [
        "model", "transformation", "sparsity", "fine-tuning", "lr", "seeds",
        "perplexity a token", "perplexity a word", "published",
    ]  # fmt: skip
    rows = []
    for arm in tuned:
        kind, sparsity = transformation(arm.source)
        numbers = {(r.transformation, r.sparsity, r.mode): r.perplexity for r in published.SPDF}
        parts = [run.finetune.test for run in arm.runs.values() if run.finetune]
        tests = [part for part in parts if part is not None]
        rates = sorted({rate for run in arm.runs.values() if (rate := lr(run)) is not None})
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                cell(sparsity, "{:.0%}"),
                Cell(arm.mode),
                Cell(", ".join(f"{rate:g}" for rate in rates) or "-", rates[0] if rates else None),
                seeds_cell(arm),
                _over_seeds([part.token_perplexity for part in tests]),
                _over_seeds([part.word_perplexity for part in tests]),
                cell(numbers.get((kind, sparsity, arm.mode)), "{:.1f}"),
            ]
        )
    notes = [
        "Ours: test perplexity, mean ± standard deviation over seeds; the lr was chosen on "
        "validation.",
        f"Published: {published.SPDF_SOURCE}.",
    ]
    title = "Table 21: sparse pretraining, dense and sparse fine-tuning"
    return Table(title, header, rows, frozenset({2, 4, 6, 7, 8}), notes)
