"""A small lm-eval task made from text of your own: pick the true continuation among four.

    python eval/local_task.py FOLDER [NAME=FOLDER ...] --text FILE [FILE ...] [--items 100]

An item is a stretch of the text (`--context-words`), its true continuation (`--answer-words`)
and continuations taken from other places of the same text, all of one number of words. Chance
is one in four. Use text that was not trained on. The items go to OUT/task as JSON lines beside
a task file, so the stock command runs the same: `lm_eval --include_path OUT/task --tasks
sparse_gpt_continuation`.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from eval import report, settings
from eval.environment import prepare_environment, versions
from eval.model_folder import ModelFolder, open_folders
from sparse_gpt.errors import UserError, run_main

TASK = "sparse_gpt_continuation"


@dataclass(frozen=True)
class Item:
    """One question. `answer` is the position of the truth in `choices`; `document` and `word`
    say where the answer begins (counted from 0)."""

    context: str
    choices: list[str]
    answer: int
    document: int
    word: int


@dataclass(frozen=True)
class Design:
    """How items are made; part of the result file."""

    items: int = 100
    choices: int = 4
    context_words: int = 32
    answer_words: int = 8
    seed: int = 0


def build_items(texts: Iterable[str], design: Design) -> list[Item]:
    """Items from documents, the same for the same texts and design.

    The texts are cut into stretches that do not overlap; an answer begins after a single blank,
    so that a line break never tells the truth from the rest. Raises `UserError` where the text
    has too few stretches or too few different ones.
    """
    places = list(_places(texts, design))
    if len(places) < design.items:
        raise UserError(
            f"--items {design.items}: the text has only {len(places)} places for an item of "
            f"{design.context_words} + {design.answer_words} words; give more text or ask for fewer"
        )
    if len({answer for *_, answer in places}) < design.choices:
        raise UserError(f"the text has fewer than {design.choices} different continuations")
    chosen = random.Random(f"{TASK} {design.seed}").sample(range(len(places)), design.items)
    items = []
    for number in sorted(chosen):
        document, word, context, answer = places[number]
        # Its own generator for each place: more items leave the earlier choices as they were.
        draw = random.Random(f"{TASK} {design.seed} {number}")
        choices = [answer]
        while len(choices) < design.choices:
            other = draw.choice(places)[3]
            if other not in choices:
                choices.append(other)
        draw.shuffle(choices)
        items.append(Item(context, choices, choices.index(answer), document, word))
    return items


def _places(texts: Iterable[str], design: Design) -> Iterable[tuple[int, int, str, str]]:
    """(document, first word of the answer, context, answer) of every usable stretch."""
    length = design.context_words + design.answer_words
    for document, text in enumerate(texts):
        words = [match.span() for match in re.finditer(r"\S+", text)]
        for start in range(0, len(words) - length + 1, length):
            middle = start + design.context_words
            context_end, answer_start = words[middle - 1][1], words[middle][0]
            if text[context_end:answer_start] != " ":
                continue
            context = text[words[start][0] : context_end]
            answer = text[answer_start : words[start + length - 1][1]]
            yield document, middle, context, answer


def write_task(folder: Path, items: list[Item]) -> Path:
    """Write the items and a task file for lm-eval into `folder`; returns the task file.

    The fields are used as they are, not through templates, so any text is safe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{TASK}.jsonl").resolve()
    with data.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(asdict(item)) + "\n")
    config = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{TASK}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def evaluate_folders(
    folders: list[ModelFolder],
    task_folder: Path,
    design: Design,
    *,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
) -> list[report.Result]:
    """Score each folder on the task that `write_task` wrote. Call `prepare_environment` first."""
    import lm_eval.tasks

    from eval import harness

    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=task_folder)
    loaded: dict[str, Any] = dict(manager.load([TASK]))
    results = []
    for folder in folders:
        start = time.monotonic()
        model = harness.open_model(folder, device=device, dtype=dtype, batch_size=batch_size)
        outcome = harness.run(model, loaded, limit=None)
        score, stderr = outcome.metric(TASK, "acc")
        requests, truncated = outcome.requests[TASK], outcome.truncated[TASK]
        results.append(
            {
                "kind": "continuation",
                "schema": report.SCHEMA,
                "model": {**folder.describe(), **outcome.model},
                "settings": {
                    **asdict(design),
                    "batch_size": batch_size,
                    "device": device,
                    "dtype": dtype,
                    "seeds": harness.SEEDS,
                },
                "versions": versions(),
                "tasks": {
                    "continuation": {
                        "score": score,
                        "stderr": stderr,
                        "metric": "acc",
                        "tasks": [TASK],
                        "shots": 0,
                        "version": outcome.versions[TASK],
                        "documents": outcome.samples[TASK]["effective"],
                        "requests": requests,
                        "truncated": truncated,
                        "truncated_share": truncated / requests,
                        "metrics": harness.plain_metrics(outcome.results[TASK]),
                    }
                },
                "average": None,
                "notes": [],
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    return results


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Multiple-choice continuation task from local text, run by lm-eval."
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="model folder, or NAME=FOLDER")
    add("--text", type=Path, nargs="+", metavar="PATH", help="held-out text: txt, jsonl, parquet")
    add("--text-field", default="text", help="field of jsonl and parquet rows")
    add("--items", type=int, default=Design.items)
    add("--choices", type=int, default=Design.choices)
    add("--context-words", type=int, default=Design.context_words)
    add("--answer-words", type=int, default=Design.answer_words)
    add("--seed", type=int, default=Design.seed)
    add("--batch-size", type=int, default=16)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=settings.DTYPES, default="auto", help="auto: what config.json says")
    add("--out", type=Path, default=Path("runs/continuation"), metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, check, build the task, evaluate, write, print."""
    prepare_environment(offline=True)
    options = settings.parse(build_parser(), argv)
    for flag in ("items", "context_words", "answer_words", "batch_size"):
        settings.positive("--" + flag.replace("_", "-"), getattr(options, flag))
    if options.choices < 2:
        raise UserError(f"--choices must be at least 2, got {options.choices}")
    if not options.text:
        raise UserError("--text is missing: name the held-out text to make the task from")
    folders = open_folders(options.folders)
    from eval.text_source import local_text
    from sparse_gpt.data.corpus import iter_documents

    design = Design(
        options.items, options.choices, options.context_words, options.answer_words, options.seed
    )

    items = build_items(iter_documents(local_text(options.text, options.text_field)), design)
    task_folder = options.out / "task"
    path = write_task(task_folder, items)
    print(f"wrote {len(items)} items for {path}", file=sys.stderr, flush=True)
    results = evaluate_folders(
        folders,
        task_folder,
        design,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    for folder, result in zip(folders, results):
        written = report.write_result(options.out, folder.file_name, result)
        print(f"wrote {written}", file=sys.stderr, flush=True)
    table = report.continuation_table(results)
    report.write_table(options.out, "continuation", table)
    print(table)


if __name__ == "__main__":
    run_main(main)
