"""Running what is planned: side by side, resumable, each finished run recorded as it ends."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_gpt.config_file import dump_yaml
from sparse_gpt.durable import write_json
from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD, EXIT_USER_ERROR, UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.finetune_record import finetune_record
from sparse_gpt.experiment.identity import changes, config_tree
from sparse_gpt.experiment.leaderboard_record import leaderboard_record
from sparse_gpt.experiment.plan import Run
from sparse_gpt.experiment.processes import Processes, Slot
from sparse_gpt.experiment.record import (
    AnyRun,
    LaterRun,
    Records,
    diverged_record,
    make_record,
    read_json,
)
from sparse_gpt.experiment.sessions import Sessions
from sparse_gpt.experiment.show import Show
from sparse_gpt.experiment.stages import has_weights, weights_of
from sparse_gpt.json_file import parse_object

POLL_SECONDS = 1.0
LOG_TAIL_LINES = 30
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SCRIPTS = {
    "pretrain": "launch/pretrain.py",
    "finetune": "launch/finetune.py",
    "leaderboard": "eval/leaderboard.py",
}
STOPPED = {
    EXIT_STOPPED: ", stopped on request; start again to go on",
    EXIT_STOPPED_FOR_GOOD: ", stopped by the file STOP in its folder, or its deadline",
}
RECORDS = {
    "pretrain": make_record,
    "finetune": finetune_record,
    "leaderboard": leaderboard_record,
}


class Stopped(Exception):
    """A signal asked the runner to end; the argument is its number."""


@dataclass
class Job:
    """A run of this start: queued, running, done, failed."""

    run: AnyRun
    state: str = "queued"
    step: int = 0
    seconds: float = 0.0  # of its earlier sessions and this one
    first_step: int = 0  # where this start began
    began: float = 0.0  # time.time()
    loss: float | None = None
    diverged: bool = False
    processes: Processes | None = None
    sessions: Sessions | None = field(default=None, repr=False)


class Runner:
    """Runs a list of runs on the slots of this machine."""

    def __init__(
        self,
        runs: Sequence[AnyRun],
        records: Records,
        corpora: Corpora,
        slots: Sequence[Slot],
        ranks: int,
        show: Show,
        keep: Sequence[int] = (),
        launcher: Sequence[str] = (),
    ) -> None:
        """`keep`: file descriptors that runs inherit; `launcher`: of the deepspeed command."""
        self.jobs = [Job(run) for run in runs]
        self.records, self.corpora, self.show = records, corpora, show
        self.slots, self.ranks = list(slots), ranks
        self.keep, self.launcher = keep, launcher
        self._on_slot: dict[int, Job] = {}

    def go(self) -> bool:
        """Run everything that is not done; True where nothing failed.

        SIGINT and SIGTERM end the runs and raise `Stopped`.
        """
        before = {number: signal.signal(number, _stop) for number in SIGNALS}
        try:
            self._skip_done()
            self.show.begin(self.jobs)
            while True:
                self._fill()
                if not self._on_slot:
                    break
                time.sleep(POLL_SECONDS)
                self._look()
                self.show.update(self.jobs)
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)  # the runs are being ended
            running = list(self._on_slot.values())
            for job in running:
                assert job.processes is not None
                job.processes.terminate()
            for job in running:
                assert job.processes is not None
                job.processes.end()
            self.show.end(self.jobs)
            for number, handler in before.items():
                signal.signal(number, handler)
        return all(job.state != "failed" for job in self.jobs)

    def _skip_done(self) -> None:
        for job in self.jobs:
            why = self.records.why_not_done(job.run, self.corpora)
            if why is None:
                job.state, job.step = "done", job.run.plan.steps
                job.diverged = "diverged" in (self.records.read(job.run.name) or {})
            elif why:
                self.show.say(f"{job.run.name}: its record is of another run, repeated: {why}")
        for job in self.jobs:
            if job.state == "done" or isinstance(job.run, Run):
                continue
            before = self._before(job.run)
            if before.state == "done" and not (before.diverged or has_weights(job.run.after)):
                before.state, before.step = "queued", 0
                self.show.say(
                    f"{before.run.name}: its weights are gone, and {job.run.name} needs them"
                )

    def _fill(self) -> None:
        for index, slot in enumerate(self.slots):
            if index in self._on_slot:
                continue
            job = next((job for job in self.jobs if self._is_ready(job)), None)
            if job is None:
                return
            self._start(job, slot)
            self._on_slot[index] = job

    def _is_ready(self, job: Job) -> bool:
        """Whether a job waits for a slot alone. One whose pretraining failed fails, too."""
        if job.state != "queued" or isinstance(job.run, Run):
            return job.state == "queued"
        before = self._before(job.run)
        if before.state == "failed" or before.diverged:
            job.state = "failed"
            why = "diverged" if before.diverged else "failed"
            self.show.say(f"{job.run.name} FAILED: {before.run.name}, which it is after, {why}")
            return False
        return before.state == "done"

    def _before(self, run: LaterRun) -> Job:
        return next(job for job in self.jobs if job.run.name == run.after.name)

    def _start(self, job: Job, slot: Slot) -> None:
        run = job.run
        set_aside(run, self.corpora, self.show)
        config = run.folder / "run.yaml"
        config.write_text(dump_yaml(run.config), encoding="utf-8")
        job.step, job.loss = progress_of(run)
        job.began, job.first_step = time.time(), job.step
        job.sessions = Sessions(run.folder)
        job.sessions.begin(job.began)
        alone = run.stage == "leaderboard"  # one process, here
        job.processes = Processes(
            SCRIPTS[run.stage],
            run.arguments(config),
            1 if alone else self.ranks,
            slot,
            run.folder / "log.txt",
            self.keep,
            () if alone else self.launcher,
        )
        job.state = "running"
        self.show.started(job)

    def _look(self) -> None:
        for index, job in list(self._on_slot.items()):
            assert job.processes is not None and job.sessions is not None
            code = job.processes.poll()
            job.sessions.seen(time.time())
            job.seconds = job.sessions.seconds
            job.step, job.loss = progress_of(job.run)
            if code is None:
                continue
            job.processes.end()
            del self._on_slot[index]
            try:
                record = self._record(job.run, code)
            except UserError as error:
                job.state = "failed"
                log = job.run.folder / "log.txt"
                self.show.failed(job, str(error), log, tail(log))
                continue
            job.state, job.diverged = "done", "diverged" in record
            self.show.finished(job, record)

    def _record(self, run: AnyRun, code: int) -> dict[str, Any]:
        """Write what a run that ended came to. Raises `UserError` where it failed."""
        if not code:
            return self.records.write(run, self.corpora, RECORDS[run.stage])
        if code == EXIT_USER_ERROR and isinstance(run, Run):
            record = diverged_record(run, self.corpora)
            if record is not None:
                return self.records.write(run, self.corpora, lambda *_: record)
        raise UserError(f"exit code {code}{STOPPED.get(code, '')}")


def _stop(number: int, _frame: object) -> None:
    raise Stopped(number)


def set_aside(run: AnyRun, corpora: Corpora, show: Show) -> None:
    """Move away the folder of another run of this name, checkpoints and all.

    `run.json` in it says what the run computes, and from which data.
    """
    wanted = {
        "config": config_tree(run.config),
        "data": _identities(run, corpora),
        "weights": weights_of(run),
    }
    path, differing = run.folder / "run.json", []
    if path.is_file():
        begun = read_json(path)
        saved = begun.get("config")
        if not isinstance(saved, dict):
            raise UserError(f"{path}: no config in it; remove the run's folder to repeat the run")
        differing = changes(saved, run.config)
        differing += ["other data"] if begun.get("data") != wanted["data"] else []
        other_weights = begun.get("weights") != wanted["weights"]
        differing += ["other weights to start from"] if other_weights else []
    if differing:
        number = 1
        while (aside := run.folder.with_name(f"{run.folder.name}.old{number}")).exists():
            number += 1
        run.folder.rename(aside)
        why = "; ".join(differing)
        show.say(f"{run.name}: what was begun is of another run, now {aside}: {why}")
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _identities(run: AnyRun, corpora: Corpora) -> dict[str, str]:
    opened = {name: corpora.opened(name) for name in run.corpora}
    return {name: data.identity for name, data in opened.items() if data is not None}


def progress_of(run: AnyRun) -> tuple[int, float | None]:
    """Steps in a run's logs of metrics, and the last loss in one; (0, None) without any."""
    logs = sorted(run.metric_folders(), key=lambda path: path.stat().st_mtime)
    seen = [progress(folder) for folder in logs]
    losses = [loss for _, loss in seen if loss is not None]
    return sum(step for step, _ in seen), losses[-1] if losses else None


def progress(folder: Path) -> tuple[int, float | None]:
    """Last step in a run's log of metrics, and the last loss in it; (0, None) without one."""
    try:
        lines = _last_lines(folder / "metrics.jsonl", 4096)
    except FileNotFoundError:
        return 0, None
    for line in reversed(lines):
        try:
            entry = parse_object(line)
        except ValueError:  # cut by the seek, or being written
            continue
        step, loss = entry.get("step"), entry.get("loss")  # a loss may be the text nan
        if type(step) is int and (isinstance(loss, float) or loss in ("nan", "inf", "-inf")):
            return step, float(loss)
    return 0, None


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(_last_lines(log, 1 << 16)[-LOG_TAIL_LINES:])


def _last_lines(path: Path, most: int) -> list[str]:
    """Of the last `most` bytes of a file; the first may be cut."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - most))
        return file.read(most).decode(errors="replace").splitlines()
