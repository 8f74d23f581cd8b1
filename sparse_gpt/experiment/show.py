"""What a start shows: a live table on a terminal, lines elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sparse_gpt.experiment.estimate import Estimates, duration, remaining
from sparse_gpt.experiment.plan import Run
from sparse_gpt.experiment.record import AnyRun

if TYPE_CHECKING:
    from sparse_gpt.experiment.runner import Job

LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


class Show:
    """Tells how the runs go. `slots`: how many run side by side."""

    def __init__(self, estimates: Estimates, slots: int, console: Console | None = None) -> None:
        self.estimates, self.slots = estimates, slots
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last_line = time.monotonic()

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def begin(self, jobs: "Sequence[Job]") -> None:
        done = sum(job.state == "done" for job in jobs)
        self.say(f"{len(jobs)} runs, {done} done, {self.slots} side by side")
        if self.console.is_terminal:  # drawn when told to: a thread of its own would fork badly
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()

    def started(self, job: "Job") -> None:
        from_step = f", goes on from step {job.first_step} or before" if job.first_step else ""
        self.say(f"{_clock()}  {job.run.name} started{from_step}")

    def finished(self, job: "Job", record: dict[str, Any]) -> None:
        losses = ", ".join(f"{split} {loss:.4f}" for split, loss in record["loss"].items())
        if "leaderboard" in record:
            average = record["leaderboard"]["average"]
            losses = "no average" if average is None else f"average {100 * average['score']:.2f} %"
        losses = f"diverged: {record['diverged']}" if "diverged" in record else losses
        self.estimates.learn(job.run, record)
        self.say(f"{_clock()}  {job.run.name} done in {duration(record['seconds'])}: {losses}")

    def failed(self, job: "Job", why: str, log: Path, tail: str) -> None:
        self.say(f"{_clock()}  {job.run.name} FAILED: {why}; the end of {log}:\n{tail}")

    def update(self, jobs: "Sequence[Job]") -> None:
        if self._live is not None:
            self._live.update(self._table(jobs), refresh=True)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            running = "; ".join(
                f"{job.run.name} {job.step}/{job.run.plan.steps}"
                for job in jobs
                if job.state == "running"
            )
            self.say(f"{_clock()}  {self._summary(jobs)}: {running}")

    def end(self, jobs: "Sequence[Job]") -> None:
        if self._live is not None:
            self._live.update(self._table(jobs), refresh=True)
            self._live.stop()
            self._live = None
        failed = [job.run.name for job in jobs if job.state == "failed"]
        done = sum(job.state == "done" for job in jobs)
        self.say(f"{done} of {len(jobs)} runs done" + (f"; failed: {failed}" if failed else ""))

    def _left(self, job: "Job") -> float | None:
        """Seconds until a job ends."""
        if job.state in ("done", "failed"):
            return 0.0
        steps = job.run.plan.steps
        taken = job.step - job.first_step
        if job.state == "running" and taken > 0:
            pace = (time.time() - job.began) / taken
            return pace * (steps - job.step)
        return self.estimates.seconds(job.run)

    def _summary(self, jobs: "Sequence[Job]") -> str:
        done = sum(job.state == "done" for job in jobs)
        left = [self._left(job) for job in jobs if job.state in ("running", "queued")]
        return f"{done}/{len(jobs)} done, {duration(remaining(left, self.slots))} left"

    def _table(self, jobs: "Sequence[Job]") -> Table:
        table = Table("run", "state", "step", "loss", "time", "left", title=self._summary(jobs))
        running = [job for job in jobs if job.state == "running"]
        ended = [job for job in jobs if job.state in ("done", "failed")]
        queued = [job for job in jobs if job.state == "queued"]
        for job in [*ended[-4:], *running, *queued[:4]]:
            table.add_row(
                job.run.name,
                job.state,
                f"{job.step}/{job.run.plan.steps}",
                "" if job.loss is None else f"{job.loss:.4f}",
                duration(job.seconds) if job.seconds else "",
                duration(self._left(job)) if job.state in ("running", "queued") else "",
            )
        if len(queued) > 4:
            table.add_row(f"{len(queued) - 4} more", "queued")
        return table


def list_runs(
    runs: Sequence[AnyRun], why: dict[str, str | None], estimates: Estimates, slots: int
) -> str:
    """The plan as text: a row an arm, what is done, what is left. `why`: see `why_not_done`."""
    rows = [("arm", "seeds", "done", "steps", "tokens", "FLOPs", "layers", "model", "time a run")]
    arms = dict.fromkeys(run.row for run in runs)
    for arm in arms:
        mine = [run for run in runs if run.row == arm]
        first, done = mine[0], sum(why[run.name] is None for run in mine)
        rows.append(
            (
                arm,
                ",".join(str(run.seed) for run in mine),
                f"{done}/{len(mine)}",
                *_work(first),
                *_ratios(first),
                duration(estimates.seconds(first)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    for arm, match in {run.arm: run.match for run in runs if run.match is not None}.items():
        settings = ", ".join(f"{key} {value}" for key, value in match.settings.items())
        lines.append(
            f"{arm}: FLOPs of {match.arm}, by {match.by} ({settings}), {match.residual:+.2%}"
        )
    lines += [f"{name}: to be repeated: {text}" for name, text in why.items() if text]
    left = [run for run in runs if why[run.name] is not None]
    seconds = remaining((estimates.seconds(run) for run in left), slots)
    lines.append(
        f"{len(runs)} runs, {len(runs) - len(left)} done; {duration(seconds)} left on "
        f"{slots} side by side"
    )
    return "\n".join(lines)


def _work(run: AnyRun) -> tuple[str, str, str]:
    """Steps, tokens and FLOPs; of fine-tuning at most, and unknown before its data is made."""
    if not run.plan.steps:
        return "?", "?", "?"
    return f"{run.plan.steps:,}", f"{run.plan.tokens:,}", f"{run.plan.flops_total:.4e}"


def _ratios(run: AnyRun) -> tuple[str, str]:
    """FLOPs over the baseline's, of the sparsified layers and of all; for pretraining."""
    if not isinstance(run, Run):
        return "", ""
    return f"{run.ratio_layers:.4f}", f"{run.ratio_model:.4f}"


def _clock() -> str:
    return time.strftime("%H:%M:%S")
