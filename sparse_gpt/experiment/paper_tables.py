"""The papers' tables filled with our numbers, the published ones beside them.

A published row stands beside ours where the transformation and the nominal sparsity agree. Models,
data and budgets agree only in the experiments of the papers' size: each table says whose is what.
"""

from sparse_gpt.experiment import published
from sparse_gpt.experiment.arms import MAIN, Arm, arms, method, transformation
from sparse_gpt.experiment.results import Model, Record, Results
from sparse_gpt.experiment.statistics import perplexity, summarise
from sparse_gpt.experiment.table import Cell, Table, cell
from sparse_gpt.experiment.tables import lr, seeds_cell, spread_cell

OTHER_SIZE = (
    "Published models are GPT-3 Small (125M); ours are smaller, and so are data and budget."
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
        tables.append(leaderboard(boards, _of_paper_size(trained)))
    if tuned:
        tables.append(spdf(tuned, _of_paper_size(trained)))
    return tables


def _shape(model: Model) -> tuple[int, int, int, int]:
    return model.n_layer, model.d_model, model.d_ff, model.n_head


def _of_paper_size(trained: list[Arm]) -> bool:
    return any(a.any.model and _shape(a.any.model) == published.GPT3_SMALL for a in trained)


def _published_size(record: Record) -> published.Size | None:
    """The row of Tables 14 and 16 that this model is, up to its printed d_head."""
    kind = transformation(record)
    for row in published.SIZES:
        printed = (row.n_layer, row.d_model, row.d_ff, row.n_head)
        if record.model and kind == (row.transformation, row.sparsity):
            return row if printed == _shape(record.model) else None
    return None


def sizes(trained: list[Arm]) -> Table:
    """Tables 14 and 16."""
    header = [
        "model", "transformation", "method", "sparsity", "sparsity, counted",
        "n_layer", "d_model", "d_ff", "n_head", "d_head", "as published",
    ]  # fmt: skip
    rows = []
    for arm in trained:
        model = arm.any.model
        assert model is not None, "the reader refuses pretraining records without a model"
        kind, sparsity = transformation(arm.source)
        same = _published_size(arm.any)
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                Cell(method(arm.source)),
                cell(sparsity, "{:.0%}"),
                cell(model.sparsity, "{:.2%}"),
                cell(model.n_layer),
                cell(model.d_model),
                cell(model.d_ff),
                cell(model.n_head),
                cell(model.d_model / model.n_head, "{:g}"),
                Cell("yes" if same else "-"),
            ]
        )
    notes = [f"Published: {published.SIZES_SOURCE}; d_head is printed as 64 in all rows there."]
    return Table("Tables 14 and 16: sizes", header, rows, frozenset(range(3, 10)), notes)


def end_to_end(trained: list[Arm]) -> Table:
    """Table 17."""
    header = [
        "model", "transformation", "sparsity", "sequences", "FLOPs a sequence", "total FLOPs",
        "seeds", "perplexity", "published FLOPs a sequence", "published perplexity",
    ]  # fmt: skip
    rows = []
    matched = False
    for arm in trained:
        kind, sparsity = transformation(arm.source)
        row = _published_run(arm.any)
        matched |= row is not None
        values = [v for r in arm.runs.values() if (v := _token_perplexity(r)) is not None]
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                cell(sparsity, "{:.0%}"),
                cell(_sequences(arm.any), "{:,.0f}"),
                cell(arm.any.flops.per_sequence if arm.any.flops else None, "{:.4e}"),
                cell(arm.flops(), "{:.4e}"),
                seeds_cell(arm),
                spread_cell(summarise(values) if values else None, 2),
                cell(row.flops_per_sequence if row else None, "{:.4e}"),
                Cell(f"{row.perplexity} ± {row.spread}", row.perplexity) if row else Cell("-"),
            ]
        )
    notes = ["Ours: test perplexity a token, mean ± standard deviation over seeds."]
    notes.append(
        f"Published: {published.END_TO_END_SOURCE}."
        if matched
        else f"No arm is a model of {published.END_TO_END_SOURCE.split(':')[0]}: none published."
    )
    numeric = frozenset({2, 3, 4, 5, 7, 8, 9})
    return Table("Table 17: training FLOPs and perplexity", header, rows, numeric, notes)


def _published_run(record: Record) -> published.EndToEnd | None:
    if record.model is None:
        return None
    kind = transformation(record)
    if _published_size(record) is not None:
        name = "GPT-3 Small"
    elif _shape(record.model) == published.GPT3_MEDIUM and kind == ("Dense", 0.0):
        name = "GPT-3 Medium"
    else:
        return None
    rows = (r for r in published.END_TO_END if (r.transformation, r.sparsity) == kind)
    return next((row for row in rows if row.model == name), None)


def _sequences(record: Record) -> float | None:
    length = record.config.get("seq_len")
    if record.tokens is None or not isinstance(length, int) or length < 1:
        return None
    return record.tokens / length


def _token_perplexity(record: Record) -> float | None:
    loss = record.final_loss("test")
    return None if loss is None else perplexity(loss)


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


def leaderboard(boards: list[Arm], paper_size: bool) -> Table:
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
    notes += [] if paper_size else [OTHER_SIZE]
    evaluations = [run.leaderboard for arm in boards for run in arm.runs.values()]
    notes += dict.fromkeys(n for board in evaluations if board for n in board.notes)
    numeric = frozenset({2, *range(6, 12)})
    return Table("Table 15: Open LLM Leaderboard", header, rows, numeric, notes)


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


def spdf(tuned: list[Arm], paper_size: bool) -> Table:
    """Table 21, one row a number of it."""
    header = [
        "model", "transformation", "sparsity", "fine-tuning", "lr", "seeds",
        "perplexity a token", "perplexity a word", "published",
    ]  # fmt: skip
    rows = []
    for arm in tuned:
        kind, sparsity = transformation(arm.source)
        numbers = {(r.transformation, r.sparsity, r.mode): r.perplexity for r in published.SPDF}
        rates = sorted({rate for run in arm.runs.values() if (rate := lr(run)) is not None})
        rows.append(
            [
                Cell(arm.label),
                Cell(kind),
                cell(sparsity, "{:.0%}"),
                Cell(arm.mode),
                Cell(", ".join(f"{rate:g}" for rate in rates) or "-", rates[0] if rates else None),
                seeds_cell(arm),
                _tuned_perplexity(arm, "token_perplexity"),
                _tuned_perplexity(arm, "word_perplexity"),
                cell(numbers.get((kind, sparsity, arm.mode)), "{:.1f}"),
            ]
        )
    notes = [
        "Ours: test perplexity, mean ± standard deviation over seeds; the lr was chosen on "
        "validation.",
        f"Published: {published.SPDF_SOURCE}.",
    ]
    notes += [] if paper_size else [OTHER_SIZE]
    title = "Table 21: sparse pretraining, dense and sparse fine-tuning"
    return Table(title, header, rows, frozenset({2, 4, 6, 7, 8}), notes)


def _tuned_perplexity(arm: Arm, which: str) -> Cell:
    parts = [run.finetune.test for run in arm.runs.values() if run.finetune]
    values = [getattr(part, which) for part in parts if part is not None]
    known = [value for value in values if value is not None and value < float("inf")]
    return spread_cell(summarise(known) if known else None, 2)
