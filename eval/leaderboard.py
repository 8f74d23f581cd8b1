"""Score exported models on the five tasks of the Open LLM Leaderboard (paper 001, Table 15).

    python eval/leaderboard.py FOLDER [NAME=FOLDER ...] [--data MIRROR] [--shots zero] [--limit 20]
    python eval/leaderboard.py --write-tasks DIR --data MIRROR

FOLDER is a model folder, or that of a run of ours, whose newest checkpoint is exported below --out.
A run that was stopped goes on where it was when the same command is given again: see
`run_folder.py`. Result files and their schema: see `report.py`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import leaderboard_tasks, report, settings
from eval.environment import prepare_environment
from eval.leaderboard_run import evaluate_folders
from eval.model_folder import exported, open_folders
from sparse_gpt.errors import UserError, run_main

SCORERS = ("auto", "shared", "stock")


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
    add("folders", nargs="*", metavar="FOLDER", help="model or run folder, or NAME=FOLDER")
    add("--data", type=Path, metavar="DIR", help="mirror of the data sets; default: the Hub")
    add("--shots", choices=leaderboard_tasks.SHOTS, default="leaderboard")
    add("--tasks", nargs="+", metavar="TASK", help=", ".join(leaderboard_tasks.TASKS))
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    add(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="N|auto",
        help="sequences of full length at a time; auto: what is fastest here",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=settings.DTYPES, default="auto", help="auto: what config.json says")
    add("--scorer", choices=SCORERS, default="auto", help="stock: lm-eval's own, slower")
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
    prepare_environment(offline=mirror is not None)  # before anything reads it
    given = [exported(text, options.out) for text in options.folders]
    folders = open_folders(given) if given else []
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
        out=options.out,
        shots=options.shots,
        mirror=mirror,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        scorer=options.scorer,
    )
    table = report.tables(results)
    report.write_table(options.out, "leaderboard", table)
    print(table)


if __name__ == "__main__":
    run_main(main)
