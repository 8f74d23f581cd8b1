"""Evaluate model folders on the leaderboard's tasks, task by task, going on where a run stopped."""

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import leaderboard_tasks, report
from eval.environment import resolve_device, versions
from eval.leaderboard_result import average, column, entry, notes
from eval.leaderboard_tasks import LeaderboardTask
from eval.model_folder import ModelFolder
from eval.projection import Remaining, duration, project
from eval.run_folder import HUB, RunFolder, data_sha256, identity

if TYPE_CHECKING:
    from eval.harness import CountingModel


def evaluate_folders(
    folders: list[ModelFolder],
    tasks: list[LeaderboardTask],
    *,
    out: Path | None = None,
    shots: str = "leaderboard",
    mirror: Path | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    scorer: str = "auto",
) -> list[report.Result]:
    """Results of each folder on the same documents.

    out: where files of tasks are kept and looked for (see `run_folder`), and the result of each
    folder; None keeps nothing. mirror: None reads the data sets from the Hub. Call
    `prepare_environment` first.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as temporary:
            return evaluate_folders(
                folders, tasks, out=Path(temporary), shots=shots, mirror=mirror, limit=limit,
                batch_size=batch_size, device=device, dtype=dtype, scorer=scorer,
            )  # fmt: skip
    run = _Run(
        tasks,
        mirror,
        limit,
        batch_size,
        {
            "name": leaderboard_tasks.NAMES[shots],
            "shots": shots,
            "limit": limit,
            "dtype": dtype,
            "device": resolve_device(device),
            "scorer": scorer,
            "versions": versions(),
        },
    )
    return [run.evaluate(folder, out) for folder in folders]


class _Run:
    """What all folders have in common; the data is read once, when the first task needs it."""

    def __init__(
        self,
        tasks: list[LeaderboardTask],
        mirror: Path | None,
        limit: int | None,
        batch_size: int | str,
        settings: dict[str, Any],
    ) -> None:
        self.tasks, self.mirror, self.limit = tasks, mirror, limit
        self.batch_size, self.settings = batch_size, settings
        self._data = {task.key: data_sha256(task, mirror) for task in tasks}
        self._loaded: dict[str, dict[str, Any]] = {}

    def evaluate(self, folder: ModelFolder, out: Path) -> report.Result:
        """The result of one folder, written to `out`."""
        start = time.monotonic()
        files = RunFolder(out, folder, identity(folder, self.settings))
        found = {
            name: files.read(name, self._data[task.key])
            for task in self.tasks
            for name in task.tasks
        }
        records = {name: record for name, record in found.items() if record is not None}
        if files.others and files.new:
            _say(
                f"{folder.name}: other weights, settings or versions than in "
                f"{', '.join(files.others)}, so a folder of its own: {files.path}"
            )
        _say(
            f"{folder.name}: {len(records)} of {len(found)} lm-eval tasks are finished in "
            f"{files.path}"
        )
        if len(records) < len(found):
            self._complete(folder, files, records)
        entries = {name: record["entry"] for name, record in records.items()}
        columns = {task.key: column(task, entries) for task in self.tasks}
        result = {
            "kind": "leaderboard",
            "schema": report.SCHEMA,
            "model": {**folder.describe(), **files.model()},
            "run_sha256": files.sha256,
            "settings": self._described(),
            "versions": versions(),
            "tasks": columns,
            "average": average(columns),
            "notes": notes(columns, self.limit),
            "seconds": round(sum(record["seconds"] for record in records.values()), 1),
        }
        _say(f"{folder.name}: {duration(time.monotonic() - start)} this time")
        _say(f"wrote {report.write_result(out, folder.file_name, result)}")
        return result

    def _complete(
        self, folder: ModelFolder, files: RunFolder, records: dict[str, dict[str, Any]]
    ) -> None:
        """Evaluate and write the tasks that `records` lacks, and add them."""
        from eval import harness

        model = harness.open_model(
            folder,
            device=self.settings["device"],
            dtype=self.settings["dtype"],
            batch_size=self.batch_size,
            scorer=self.settings["scorer"],
        )
        files.describe(harness.describe(model))
        missing = {name: task for task in self.tasks for name in task.tasks if name not in records}
        remaining = self._project(model, missing)
        for name, task in missing.items():
            start = time.monotonic()
            built = self._load(task)["tasks"][name]
            if remaining is not None:
                model.advance = remaining.advance
                model.begin = remaining.begin
            else:
                _say(name)
            model.answers_path = files.answers(name)
            one = {"tasks": {name: built}, "groups": {}, "group_map": {}}
            outcome = harness.run(model, one, self.limit, documents=True)
            pool = leaderboard_tasks.pool_size(built)
            records[name] = {
                "entry": entry(name, task.metric, outcome, pool),
                "batch_tokens": model.scorer.budget if model.scorer else None,
                "seconds": round(time.monotonic() - start, 1),
            }
            files.write(name, self._data[task.key], records[name])
            built._instances = None  # the prompts; a long run would keep those of every task

    def _project(
        self, model: "CountingModel", missing: dict[str, LeaderboardTask]
    ) -> Remaining | None:
        """Read the data and say what is ahead. The stock scorer's speed is not known before."""
        for task in dict.fromkeys(missing.values()):
            self._load(task)
        if model.scorer is None or model.measured is None:
            return None
        loaded = {"tasks": {n: self._load(task)["tasks"][n] for n, task in missing.items()}}
        estimates = project(model, loaded, missing, self.limit)
        parts = []
        for task in dict.fromkeys(missing.values()):
            seconds = sum(estimates[name].seconds for name in task.tasks if name in estimates)
            parts.append(f"{task.title} {duration(seconds)}")
        total = sum(estimate.seconds for estimate in estimates.values())
        _say(
            f"{model.scorer.budget:,} tokens at a time, {model.measured.speed:,.0f} a second; "
            f"projected: {duration(total)} ({', '.join(parts)})"
        )
        return Remaining(estimates)

    def _load(self, task: LeaderboardTask) -> dict[str, Any]:
        if task.key not in self._loaded:
            _say(f"reading the data of {task.title}")
            loaded = leaderboard_tasks.load([task], self.settings["shots"], self.mirror)
            self._loaded[task.key] = loaded
        return self._loaded[task.key]

    def _described(self) -> dict[str, Any]:
        from eval import harness

        settings = {key: value for key, value in self.settings.items() if key != "versions"}
        return {
            **settings,
            "batch_size": self.batch_size,
            "data": str(self.mirror) if self.mirror else HUB,
            "data_sha256": self._data,
            "seeds": harness.SEEDS,
        }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
