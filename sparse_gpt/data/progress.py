"""Progress of a long pass over data: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PassProgress:
    """Counts bytes, documents and tokens of one pass. total_bytes None: the end is unknown."""

    def __init__(self, label: str, total_bytes: int | None = None, every: float = 5.0):
        self.label, self.total_bytes, self.every = label, total_bytes, every
        self.bytes = self.documents = self.tokens = 0
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "PassProgress":
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total_bytes, counts="")
        return self

    def add(self, n_bytes: int, documents: int, tokens: int = 0) -> None:
        """Count work done and show it, at most every few seconds on plain lines."""
        self.bytes += n_bytes
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.bytes, counts=self._counts(now))
        elif now - self._printed >= self.every:
            self._printed = now
            print(f"{self.label}: {self._counts(now)}", file=sys.stderr, flush=True)

    def _counts(self, now: float) -> str:
        of = f" of {self.total_bytes / 1e6:,.1f}" if self.total_bytes else ""
        text = f"{self.bytes / 1e6:,.1f}{of} MB, {self.documents:,} documents"
        if self.tokens:
            rate = self.tokens / max(now - self._started, 1e-9)
            text += f", {self.tokens:,} tokens, {rate:,.0f} tokens/s"
        return text

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            counts = self._counts(time.monotonic())
            print(f"{self.label}: done, {counts}", file=sys.stderr, flush=True)
