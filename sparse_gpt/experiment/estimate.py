"""How long runs will take, from those that ended: of the same arm, else by what they compute."""

from collections.abc import Iterable
from statistics import median
from typing import Any

from sparse_gpt.experiment.record import AnyRun


class Estimates:
    """Seconds of whole runs; learns from every record it is shown."""

    def __init__(self) -> None:
        self._of_arm: dict[str, list[float]] = {}
        self._per_flop: list[float] = []

    def learn(self, run: AnyRun, record: dict[str, Any]) -> None:
        """A run that ended: its wall time over all starts."""
        self.learn_seconds(run, record["seconds"])
        self._of_arm.setdefault(run.row, []).append(record["seconds"])

    def learn_seconds(self, run: AnyRun, seconds: float) -> None:
        """A run took so long, or at its present pace will."""
        if run.plan.masked_flops_total:
            self._per_flop.append(seconds / run.plan.masked_flops_total)

    def seconds(self, run: AnyRun) -> float | None:
        """What a run will take from its start; None where nothing is known yet."""
        if run.row in self._of_arm:
            return median(self._of_arm[run.row])
        if not self._per_flop:
            return None
        return median(self._per_flop) * run.plan.masked_flops_total


def remaining(seconds: Iterable[float | None], slots: int) -> float | None:
    """Wall time of runs that take so long each, side by side on `slots`; None if one is unknown."""
    known = list(seconds)
    if any(value is None for value in known):
        return None
    ends = [0.0] * slots
    for value in known:
        ends[ends.index(min(ends))] += value or 0.0
    return max(ends)


def duration(seconds: float | None) -> str:
    """`1:02:03`, `4:05`, or `?`."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
