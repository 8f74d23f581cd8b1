"""Score exported models on the five tasks of the Open LLM Leaderboard (paper 001, Table 15).

    python eval/leaderboard.py FOLDER [NAME=FOLDER ...] [--data MIRROR] [--shots zero] [--limit 20]
    python eval/leaderboard.py --write-tasks DIR --data MIRROR

Result files and their schema: see `report.py`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import leaderboard_tasks, report, settings
from eval.environment import prepare_environment, versions
from eval.leaderboard_tasks import LeaderboardTask
from eval.model_folder import ModelFolder, open_folders
from sparse_gpt.errors import UserError, run_main

if TYPE_CHECKING:
    from eval.harness import Outcome


def evaluate_folders(
    folders: list[ModelFolder],
    tasks: list[LeaderboardTask],
    *,
    shots: str = "leaderboard",
    mirror: Path | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    device: str = "auto",
    dtype: str = "auto",
) -> list[report.Result]:
    """Results of each folder on the same documents; data is read once.

    mirror: None reads the data sets from the Hub. Call `prepare_environment` first.
    """
    from eval import harness

    _say(f"reading the data of {len(tasks)} tasks")
    loaded = leaderboard_tasks.load(tasks, shots, mirror)
    results = []
    for folder in folders:
        start = time.monotonic()
        _say(f"{folder.name}: {len(loaded['tasks'])} lm-eval tasks")
        model = harness.open_model(folder, device=device, dtype=dtype, batch_size=batch_size)
        outcome = harness.run(model, loaded, limit)
        columns = {task.key: column(task, outcome, loaded["tasks"]) for task in tasks}
        results.append(
            {
                "kind": "leaderboard",
                "schema": report.SCHEMA,
                "model": {**folder.describe(), **outcome.model},
                "settings": {
                    "shots": shots,
                    "limit": limit,
                    "batch_size": batch_size,
                    "device": device,
                    "dtype": dtype,
                    "data": str(mirror) if mirror else "Hugging Face Hub",
                    "seeds": harness.SEEDS,
                },
                "versions": versions(),
                "tasks": columns,
                "average": average(columns),
                "notes": notes(columns, limit),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    return results


def column(task: LeaderboardTask, outcome: "Outcome", built: dict[str, Any]) -> dict[str, Any]:
    """One column of the table from lm-eval's numbers: see the schema in `report.py`."""
    from eval import harness, leaderboard_tasks

    entries = {}
    for name in task.tasks:
        score, stderr = outcome.metric(name, task.metric)
        entries[name] = {
            "score": score,
            "stderr": stderr,
            "shots": outcome.shots[name],
            "version": outcome.versions[name],
            "documents": outcome.samples[name]["effective"],
            "documents_available": outcome.samples[name]["original"],
            "few_shot_pool": leaderboard_tasks.pool_size(built[name]),
            "requests": outcome.requests[name],
            "truncated": outcome.truncated[name],
            "metrics": harness.plain_metrics(outcome.results[name]),
        }
    parts = list(entries.values())
    total = {
        key: sum(part[key] for part in parts)
        for key in ("documents", "documents_available", "few_shot_pool", "requests", "truncated")
    }
    score, stderr = mean_of([(part["score"], part["stderr"]) for part in parts])
    result = {
        "score": score,
        "stderr": stderr,
        "metric": task.metric,
        "tasks": list(task.tasks),
        "shots": parts[0]["shots"],
        "version": parts[0]["version"],
        **total,
        "documents_official": task.documents,
        "few_shot_pool_official": task.pool if parts[0]["shots"] else 0,
        "truncated_share": total["truncated"] / total["requests"],
    }
    if len(parts) == 1:
        return {**result, "metrics": parts[0]["metrics"]}
    weighted = sum(part["score"] * part["documents"] for part in parts)
    result["score_by_size"] = weighted / total["documents"]
    return {**result, "subjects": {n.removeprefix("mmlu_"): e for n, e in entries.items()}}


def mean_of(values: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The plain mean of independent scores and its standard error; None if one has none."""
    score = sum(value for value, _ in values) / len(values)
    errors = [error for _, error in values if error is not None]
    if len(errors) < len(values):
        return score, None
    return score, sum(error**2 for error in errors) ** 0.5 / len(values)


def average(columns: dict[str, dict[str, Any]]) -> dict[str, float | None] | None:
    """The leaderboard's average: the plain mean of five columns, None where one is missing."""
    if set(columns) != set(leaderboard_tasks.TASKS):
        return None
    score, stderr = mean_of([(part["score"], part["stderr"]) for part in columns.values()])
    return {"score": score, "stderr": stderr}


def notes(columns: dict[str, dict[str, Any]], limit: int | None) -> list[str]:
    """What a reader must know before comparing the numbers with published ones."""
    lines = []
    if limit is not None:
        lines.append(f"only the first {limit} documents of each task were scored (--limit)")
    for key, part in columns.items():
        title = leaderboard_tasks.TASKS[key].title
        for what, have, official in (
            ("documents", part["documents_available"], part["documents_official"]),
            ("few-shot documents", part["few_shot_pool"], part["few_shot_pool_official"]),
        ):
            if have != official:
                lines.append(
                    f"{title}: the data has {have:,} {what}, the official set {official:,}"
                )
    return lines


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; see the README for examples."""
    parser = argparse.ArgumentParser(
        description="Score exported models on the Open LLM Leaderboard's five tasks."
    )
    add = parser.add_argument
    add("folders", nargs="*", metavar="FOLDER", help="model folder, or NAME=FOLDER")
    add("--data", type=Path, metavar="DIR", help="mirror of the data sets; default: the Hub")
    add("--shots", choices=leaderboard_tasks.SHOTS, default="leaderboard")
    add("--tasks", nargs="+", metavar="TASK", help=", ".join(leaderboard_tasks.TASKS))
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add("--batch-size", type=_batch_size, default=8, metavar="N|auto")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=settings.DTYPES, default="auto", help="auto: what config.json says")
    add("--out", type=Path, default=Path("runs/leaderboard"), metavar="DIR")
    add("--write-tasks", type=Path, metavar="DIR", help="write files for the lm_eval command")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, check everything that costs nothing, evaluate, write, print."""
    prepare_environment(offline=False)
    options = settings.parse(build_parser(), argv)
    settings.positive("--limit", options.limit)
    if options.batch_size != "auto":
        settings.positive("--batch-size", options.batch_size)
    tasks = leaderboard_tasks.select(options.tasks)
    mirror = leaderboard_tasks.check_mirror(options.data, tasks) if options.data else None
    if options.write_tasks is None and not options.folders:
        raise UserError("give at least one model folder (or --write-tasks DIR)")
    folders = open_folders(options.folders) if options.folders else []
    prepare_environment(offline=mirror is not None)
    if options.write_tasks is not None:
        for path in leaderboard_tasks.write_tasks(
            options.write_tasks, tasks, options.shots, mirror
        ):
            _say(f"wrote {path}")
        print(
            "lm_eval --model hf --model_args pretrained=FOLDER --include_path "
            f"{options.write_tasks} --tasks {leaderboard_tasks.GROUP}"
        )
    if not folders:
        return
    results = evaluate_folders(
        folders,
        tasks,
        shots=options.shots,
        mirror=mirror,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    for folder, result in zip(folders, results):
        _say(f"wrote {report.write_result(options.out, folder.file_name, result)}")
    table = report.leaderboard_table(results)
    report.write_table(options.out, "leaderboard", table)
    print(table)


if __name__ == "__main__":
    run_main(main)
