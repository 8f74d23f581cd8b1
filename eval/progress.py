"""Progress of long work: a bar on a terminal, a plain line now and then anywhere else."""

import sys
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `total` units of work and says on stderr how far it is.

    Use as a context manager and call `advance(n)` as units are done. Off a terminal the first
    line comes ten seconds after the first unit, so short work prints nothing but its result.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._start = self._last = time.monotonic()
        self._bar = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        if not self.done:
            # Work may begin long after the bar was made (tokenising comes first).
            self._start = self._last = time.monotonic()
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
            return
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        remaining = (now - self._start) / self.done * (self.total - self.done)
        print(
            f"{self.label}: {self.done:,} of {self.total:,}, about {remaining:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
