"""How long an evaluation will take, said before it starts and while it runs."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.progress import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from eval.harness import CountingModel

SAMPLE = 12  # documents of a task that its time is projected from
SAMPLE_OF_MANY = 3  # the same where there are many tasks
MANY = 10


@dataclass(frozen=True)
class Estimate:
    """Of one lm-eval task: `seconds` in all, of which `reading` build and tokenise prompts;
    `tokens` to compute."""

    seconds: float
    reading: float
    tokens: int


def project(
    model: "CountingModel", loaded: dict[str, Any], names: Iterable[str], limit: int | None
) -> dict[str, Estimate]:
    """Estimates from the first documents of each task and the measured speed of the model.

    Shared beginnings are counted within the sample alone, so where many documents share theirs
    (MMLU with a long context) the time is overestimated.
    """
    from eval import harness
    from eval.templates import compiled_once

    assert model.scorer is not None and model.measured is not None
    names = list(names)
    sample = SAMPLE if len(names) < MANY else SAMPLE_OF_MANY
    estimates = {}
    for name in names:
        task = loaded["tasks"][name]
        documents = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
        harness.seed({"tasks": {name: task}})
        start = time.perf_counter()
        with compiled_once():
            task.build_all_requests(limit=min(sample, documents))
        requests = model.tokens(task.instances)
        share = documents / min(sample, documents)
        reading = (time.perf_counter() - start) * share
        windows, _ = model.scorer.windows(requests)
        tokens = int(sum(row.length for row in model.scorer.plan(windows)) * share)
        estimates[name] = Estimate(reading + tokens / model.measured.speed, reading, tokens)
    return estimates


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Remaining:
    """Says every few seconds on stderr how far a run of several tasks is.

    The time left is the projected time of what is left, times how much longer than projected
    everything took so far.
    """

    def __init__(self, estimates: dict[str, Estimate]) -> None:
        self._estimates = dict(estimates)
        self._finished = 0.0  # projected seconds of what is finished
        self._start = self._last = time.monotonic()
        self._name, self._count, self._answered = "", 0, 0
        self._number = 0

    def begin(self, name: str, count: int) -> None:
        """The next task, of so many requests."""
        if self._name:
            self._finished += self._estimates[self._name].seconds
        self._name, self._count, self._answered = name, count, 0
        self._number += 1

    def advance(self, answered: int, tokens: int) -> None:
        """So many more requests of the task are answered; says so now and then.

        Without tokens they were answered before this start, and take none of its time.
        """
        if tokens:
            self._answered += answered
        elif answered:
            was = self._estimates[self._name]
            left = (was.seconds - was.reading) * (1 - answered / self._count)
            self._estimates[self._name] = Estimate(was.reading + left, was.reading, was.tokens)
            self._count -= answered
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        print(
            f"{self._name}: {self._answered:,} of {self._count:,} requests, task {self._number} "
            f"of {len(self._estimates)}, about {duration(self.left(now - self._start))} left",
            file=sys.stderr,
            flush=True,
        )

    def left(self, elapsed: float) -> float:
        """Seconds left in all after `elapsed` seconds."""
        total = sum(estimate.seconds for estimate in self._estimates.values())
        estimate = self._estimates[self._name]
        share = self._answered / self._count if self._count else 0.0
        done = self._finished + estimate.reading + share * (estimate.seconds - estimate.reading)
        return elapsed / done * (total - done) if done > 0 else total
