"""Result files of the evaluations, and the markdown tables made from them.

Every evaluation writes one JSON object a model folder:

    kind       "leaderboard", "continuation" or "perplexity"
    schema     1
    model      name, folder, config_sha256, model_type, n_positions, vocab_size,
               sparse_gpt (the exporter's metadata or null), parameters, dtype, max_length, device
    settings   the options that can change a number (shots, limit, batch size, seeds, data, ...)
    versions   python, lm_eval, transformers, tokenizers, datasets, torch
    seconds    wall time of the evaluation of this model
    notes      sentences a reader of the numbers must know (limits, other data than official)

A leaderboard or continuation result has `tasks`, by column (`arc`, ... or `continuation`):

    score, stderr        of `metric`, as fractions; stderr null for a single document
    metric, tasks        lm-eval's metric and task names
    shots, version       examples in a prompt; lm-eval's version of the task
    documents            evaluated; `documents_available` in the data, `documents_official`
    requests, truncated, truncated_share
                         continuations scored, and how many lost text on the left because
                         context and continuation exceed the model's context
    metrics              all metrics and errors of lm-eval (one task), or
    subjects             the same for each of MMLU's 57 subjects

and `average` (score, stderr) over the five columns, null unless all five are there: the plain
mean of the columns, MMLU being the plain mean of its subjects, as on the Open LLM Leaderboard.
Standard errors of means are those of independent terms. `mmlu` also has `score_by_size`, the
mean over questions. A perplexity result is described in `perplexity.py`.

Run as a command it prints the tables of result files, with differences to the first one:

    python eval/report.py dense.json sparse.json
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_gpt.errors import UserError, run_main

Result = dict[str, Any]
SCHEMA = 1
COLUMNS = {
    "arc": "ARC",
    "hellaswag": "HellaSwag",
    "truthfulqa": "TruthfulQA",
    "mmlu": "MMLU",
    "winogrande": "Winogrande",
}


def write_result(out: Path, file_name: str, result: Result) -> Path:
    """Write OUT/<file_name>.<kind>.json in one step: a reader sees the old file or all of the new.

    Kinds have their own files, so evaluations may share one folder. Returns the path.
    """
    path = out / f"{file_name}.{result['kind']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def write_table(out: Path, kind: str, table: str) -> Path:
    """Write OUT/<kind>.md and return its path."""
    path = out / f"{kind}.md"
    path.write_text(table + "\n", encoding="utf-8")
    return path


def read_result(path: Path | str) -> Result:
    """Read one result file; `UserError` for anything else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read result file {path}: {error}") from None
    if not isinstance(result, dict) or result.get("kind") not in TABLES:
        raise UserError(f"{path} is no result of eval/leaderboard.py, local_task.py, perplexity.py")
    if result.get("schema") != SCHEMA:
        raise UserError(f"{path}: result schema {result.get('schema')!r}, this program reads 1")
    return result


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with padded cells; the first column is text, the others numbers."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)


def percent(value: float | None, error: float | None = None, signed: bool = False) -> str:
    """A fraction in percent with one digit, as in Table 15; `-` for what was not measured."""
    if value is None:
        return "-"
    shown = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"


def leaderboard_table(results: Sequence[Result]) -> str:
    """Paper 001's Table 15: one row a model, five columns and their average, in percent.

    Two further tables give differences to the first model (with several) and the share of
    truncated requests; notes follow.
    """
    origin = ["Transformation", "Sparsity", "Method"]
    header = ["Model", *origin, "Shots", *COLUMNS.values(), "Average"]
    rows = [
        [
            _name(result),
            *_origin(result),
            result["settings"]["shots"],
            *(percent(*_score(result, key)) for key in COLUMNS),
            percent(*_average(result)),
        ]
        for result in results
    ]
    parts = [markdown(header, rows)]
    if len(results) > 1:
        parts.append(_difference_table(results))
    rows = [[_name(r), *(percent(_share(r, key)) for key in COLUMNS)] for r in results]
    parts.append(
        "Requests truncated on the left to fit the context, in percent:\n\n"
        + markdown(["Model", *COLUMNS.values()], rows)
    )
    return "\n\n".join([*parts, *_notes(results)])


def _difference_table(results: Sequence[Result]) -> str:
    base, rest = results[0], results[1:]
    getters: list[Callable[[Result], tuple[float | None, float | None]]] = [
        *(lambda result, key=key: _score(result, key) for key in COLUMNS),
        _average,
    ]
    rows = [
        [_name(r), *(percent(*_difference(get(r), get(base)), signed=True) for get in getters)]
        for r in rest
    ]
    return (
        f"Difference to {_name(base)}, in points (± standard error of two independent runs):\n\n"
        + markdown(["Model", *COLUMNS.values(), "Average"], rows)
    )


def _difference(
    one: tuple[float | None, float | None], base: tuple[float | None, float | None]
) -> tuple[float | None, float | None]:
    if one[0] is None or base[0] is None:
        return None, None
    if one[1] is None or base[1] is None:
        return one[0] - base[0], None
    return one[0] - base[0], (one[1] ** 2 + base[1] ** 2) ** 0.5


def continuation_table(results: Sequence[Result]) -> str:
    """The local task: accuracy and length-normalised accuracy against chance, one row a model."""
    rows = []
    for result in results:
        task = result["tasks"]["continuation"]
        metrics = task["metrics"]
        rows.append(
            [
                _name(result),
                str(task["documents"]),
                percent(metrics["acc"], metrics["acc_stderr"]),
                percent(metrics["acc_norm"], metrics["acc_norm_stderr"]),
                percent(1 / result["settings"]["choices"]),
                percent(task["truncated_share"]),
            ]
        )
    header = ["Model", "Items", "Accuracy", "Accuracy (length-normalised)", "Chance", "Truncated"]
    return "\n\n".join([markdown(header, rows), *_notes(results)])


def perplexity_table(results: Sequence[Result]) -> str:
    """Perplexity by token and by word, one row a model, with ratios to the first model."""
    header = ["Model", "Text", "Tokens", "Token ppl", "Word ppl", "Bits per byte", "Context"]
    rows = []
    for result in results:
        measured = result["perplexity"]
        context = f"{result['settings']['max_length']}/{result['settings']['stride']}"
        rows.append(
            [
                _name(result),
                result["settings"]["text"],
                f"{measured['tokens']:,}",
                _perplexity(measured["token_perplexity"]),
                _perplexity(measured["word_perplexity"]),
                f"{measured['bits_per_byte']:.4f}",
                context,
            ]
        )
    if len(results) > 1:
        header.append("Word ppl / first")
        first = results[0]["perplexity"]["word_perplexity"]
        for row, result in zip(rows, results):
            own = result["perplexity"]["word_perplexity"]
            row.append(f"{own / first:.4f}" if own and first else "-")
    return "\n\n".join([markdown(header, rows), *_notes(results)])


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "leaderboard": leaderboard_table,
    "continuation": continuation_table,
    "perplexity": perplexity_table,
}


def tables(results: Sequence[Result]) -> str:
    """The tables of results of any kinds, one after another."""
    chosen = [(make, [r for r in results if r["kind"] == kind]) for kind, make in TABLES.items()]
    return "\n\n".join(make(group) for make, group in chosen if group)


def _perplexity(value: float | None) -> str:
    return "over 1e308" if value is None else f"{value:,.3f}"


# What costs as much as in the dense model: each sparsified layer, or the whole run.
ISO_FLOP = {"layer": "iso-FLOP per layer", "model": "iso-FLOP whole run"}


def _name(result: Result) -> str:
    return result["model"]["name"]


def _origin(result: Result) -> tuple[str, str, str]:
    """Transformation (and what is iso-FLOP), sparsity and method, as exported; or dashes."""
    metadata = result["model"].get("sparse_gpt") or {}
    config = metadata.get("config") or {}
    sparsity = metadata.get("sparsity")
    if not isinstance(sparsity, int | float):
        return "-", "-", "-"
    ift = config.get("ift") or {}
    member = ift.get("member", "none")
    method = (config.get("sparsity") or {}).get("algorithm", "-") if sparsity else "-"
    name = f"sparse {member}" if member != "none" else ("sparse" if sparsity else "dense")
    if member != "none" and ift.get("iso_flop") in ISO_FLOP:
        name += f" ({ISO_FLOP[ift['iso_flop']]})"
    return name, f"{100 * sparsity:.1f}%", method


def _score(result: Result, key: str) -> tuple[float | None, float | None]:
    task = result["tasks"].get(key)
    return (task["score"], task["stderr"]) if task else (None, None)


def _average(result: Result) -> tuple[float | None, float | None]:
    average = result["average"]
    return (average["score"], average["stderr"]) if average else (None, None)


def _share(result: Result, key: str) -> float | None:
    task = result["tasks"].get(key)
    return task["truncated_share"] if task else None


def _notes(results: Sequence[Result]) -> list[str]:
    """Each note once, with the models it is about where it is not about all."""
    about: dict[str, list[str]] = {}
    for result in results:
        for note in result["notes"]:
            about.setdefault(note, []).append(_name(result))
    lines = [
        f"- {note}" + (f" ({', '.join(names)})" if len(names) < len(results) else "")
        for note, names in about.items()
    ]
    return ["\n".join(lines)] if lines else []


def main(argv: list[str] | None = None) -> None:
    """Print the tables of result files."""
    parser = argparse.ArgumentParser(description="Tables of evaluation results.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    options = parser.parse_args(argv)
    print(tables([read_result(path) for path in options.results]))


if __name__ == "__main__":
    run_main(main)
