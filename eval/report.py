"""Result files of the evaluations, and the markdown tables made from them.

Every evaluation writes one JSON object a model folder:

    kind       "leaderboard", "continuation" or "perplexity"
    schema     1
    model      name, folder, config_sha256, model_type, n_positions, vocab_size,
               sparse_gpt (the exporter's metadata or null), parameters, dtype, max_length, device
    settings   the options that can change a number (shots, limit, batch size, seeds, data, ...);
               of the leaderboard also `name`, leaderboard_v1 or leaderboard_v1_zero_shot
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
    metrics              all metrics and errors of lm-eval (one task)
    outcomes             metric, documents_sha256 and values: what each document scored, in the
                         order of the data; text of 0 and 1 or a list of numbers
    subjects             in place of metrics and outcomes: all this for each of MMLU's 57 subjects

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

from eval.leaderboard_report import leaderboard_table
from eval.markdown import percent, table
from sparse_gpt.errors import UserError, run_main
from sparse_gpt.json_file import read_json

Result = dict[str, Any]
SCHEMA = 1
LARGEST_RESULT = 64 << 20  # bytes; what each of 14,000 questions scored is some 100 kB


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


def write_table(out: Path, kind: str, text: str) -> Path:
    """Write OUT/<kind>.md and return its path."""
    path = out / f"{kind}.md"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_result(path: Path | str) -> Result:
    """Read one result file; `UserError` for anything else."""
    try:
        result = read_json(path, LARGEST_RESULT)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read result file {path}: {error}") from None
    if not isinstance(result, dict) or result.get("kind") not in tuple(TABLES):
        raise UserError(f"{path} is no result of eval/leaderboard.py, local_task.py, perplexity.py")
    if result.get("schema") != SCHEMA:
        raise UserError(f"{path}: result schema {result.get('schema')!r:.40}, this program reads 1")
    model, notes = result.get("model"), result.get("notes")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise UserError(f"{path}: model.name is missing")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"{path}: notes is no list of sentences")
    try:
        TABLES[result["kind"]]([result])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: not a whole result: {error!r:.200}") from None
    return result


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
    return "\n\n".join([table(header, rows), *_notes(results)])


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
    return "\n\n".join([table(header, rows), *_notes(results)])


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "leaderboard": lambda results: "\n\n".join([leaderboard_table(results), *_notes(results)]),
    "continuation": continuation_table,
    "perplexity": perplexity_table,
}


def tables(results: Sequence[Result]) -> str:
    """The tables of results of any kinds, one after another."""
    chosen = [(make, [r for r in results if r["kind"] == kind]) for kind, make in TABLES.items()]
    return "\n\n".join(make(group) for make, group in chosen if group)


def _perplexity(value: float | None) -> str:
    return "over 1e308" if value is None else f"{value:,.3f}"


def _name(result: Result) -> str:
    return result["model"]["name"]


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
