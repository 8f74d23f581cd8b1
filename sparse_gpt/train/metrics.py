"""What a run tells: JSONL and TensorBoard always, wandb on request, lines or a live bar.

Only rank 0 speaks. `metrics.jsonl` holds one object a line, `kind` is `train`, `validation`,
`topology`, `nonfinite`, `spike`, `rollback` or `diverged`; a resumed run first drops the lines
after the step it resumes from, so the file is always one clean curve. Lines that a full disk does
not take wait in memory; no checkpoint is saved before they, too, are on the disk.
"""

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparse_gpt.config import LoggingConfig
from sparse_gpt.durable import fsync_path, write_pieces
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import parse_object, read_lines
from sparse_gpt.train.board import Board

PIECE = 1 << 20  # bytes of a log that are copied at once
REPORTS = 64  # of bad steps that a rollback's line keeps: some KiB each, of a line's MiB
FORMATS = {
    "loss": "{:.4f}",
    "median": "{:.4f}",
    "limit": "{:.4f}",
    "perplexity": "{:.2f}",
    "lr": "{:.2e}",
    "grad_norm": "{:.3f}",
    "tokens": "{:,}",
    "tokens_per_second": "{:,.0f}",
    "flops_spent": "{:.3e}",
    "mfu_active": "{:.1%}",
    "mfu_dense": "{:.1%}",
    "sparsity": "{:.4f}",
    "churn": "{:.4f}",
    "drop_fraction": "{:.3f}",
    "init_mask": "{}",
    "least_kept": "{:.1%}",
    "most_kept": "{:.1%}",
}


class _Console(Console):
    """Plain lines on stdout. Where who read them has gone, it says nothing more and ends no run."""

    def __init__(self) -> None:
        super().__init__(highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError):  # nor does the end of the process say anything
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Metrics:
    """The log of one run, on rank 0; elsewhere every call does nothing."""

    def __init__(
        self, run_dir: Path, config: LoggingConfig, name: str, total_steps: int, active: bool
    ) -> None:
        self.active, self.total_steps = active, total_steps
        self._progress: Progress | None = None
        if not active:
            return
        self.path = run_dir / "metrics.jsonl"
        self._file: Any = None
        self._waiting = b""  # lines that are not in the file yet
        self._troubled = False
        self._run_dir, self._config, self._name = run_dir, config, name
        self._wandb: Any = None
        self._board: Board | None = None
        self.console = _Console()

    def start(self, step: int) -> None:
        """Open the log after `step` steps; later lines of an earlier, ended session are dropped."""
        if not self.active:
            return
        self._open(step)
        if step >= self._config.every and not self.path.stat().st_size:
            self.say(f"warning: {self.path} is gone or empty: the log begins after step {step}")
        if self._config.wandb:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise UserError(
                    "logging.wandb: wandb is not installed; pip install 'sparse_gpt[wandb]' or "
                    "set logging.wandb: false"
                ) from None
            self._wandb = wandb.init(project=self._config.wandb_project, name=self._name)
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("steps", total=self.total_steps, completed=step)
            self._progress.start()

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines after `step` steps: the run goes on from there once more.

        Returns what they told of bad steps, the last `REPORTS` of them.
        """
        if not self.active:
            return []
        if not self._has_its_name():
            self._write_anew()
        bad = deque(self._bad_steps_after(step), maxlen=REPORTS)
        self._file.close()
        self._close_board()
        self._waiting = b""  # of steps after that: what came before was written with its checkpoint
        self._open(step)
        self.advance(step)
        return list(bad)

    def _bad_steps_after(self, step: int) -> Iterator[dict[str, Any]]:
        for line in chain(read_lines(self.path), self._waiting.splitlines()):
            with contextlib.suppress(ValueError):  # half written, as in `_lines_until`
                record = parse_object(line)
                at = record.get("step")
                if record.get("kind") == "nonfinite" and isinstance(at, int) and at > step:
                    yield {"step": at, "found": record.get("found")}

    def _open(self, step: int) -> None:
        self._trim(step)
        # Unbuffered: what a write did not take is known.
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        fsync_path(self._run_dir)  # its name
        self._board = Board(self._run_dir / "tensorboard", step)

    def _trim(self, step: int) -> None:
        if self.path.exists():
            try:
                write_pieces(self.path, self._lines_until(step))
            except ValueError as error:
                raise UserError(f"{self.path}: {error}; move it away") from None

    def _lines_until(self, step: int) -> Iterator[bytes]:
        for line in read_lines(self.path):
            try:
                at = parse_object(line).get("step", 0)
            except ValueError:  # half written by a killed run, or torn by a power cut
                continue
            if isinstance(at, int) and at <= step:
                yield line + b"\n"

    def say(self, message: str) -> None:
        """One plain line."""
        if self.active:
            try:
                self.console.print(message, markup=False)
                sys.stdout.flush()
            except OSError:  # a full disk, or the terminal is gone
                self.console = _Console()  # the old one kept the line, and would try it again

    def advance(self, step: int) -> None:
        """Move the bar, where there is one."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write one record everywhere. Numbers that are not finite are written as text."""
        if not self.active:
            return
        record = {"kind": kind, "step": step, **values}
        self._waiting += json.dumps(_plain(record)).encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as problem:
            if not self._troubled:
                self.say(f"warning: {self.path}: {problem}; its lines wait until the next save")
            self._troubled = True
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._draw({f"{kind}/{key}": value for key, value in numbers.items()}, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{key}": v for key, v in numbers.items()}, step=step)
        shown = "  ".join(
            f"{key} {FORMATS[key].format(value)}"
            for key, value in values.items()
            if key in FORMATS and value is not None
        )
        self.say(f"{kind:<10} step {step}/{self.total_steps}  {shown}")

    def sync(self) -> None:
        """All that was logged is on the disk; `OSError` where it cannot be."""
        if self.active and self._file is not None:
            self._write_waiting()
            os.fsync(self._file.fileno())
            if not self._has_its_name():
                self._write_anew()
            self._troubled = False

    def _has_its_name(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), there)

    def _write_anew(self) -> None:
        """The log as this run wrote it, where someone removed or replaced it meanwhile."""
        aside = ""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, self.path.with_name(f"{self.path.name}.replaced"))
            aside = f"; what was in its place is {self.path.name}.replaced"
        mine = self._file.fileno()
        starts = range(0, os.fstat(mine).st_size, PIECE)
        write_pieces(self.path, (os.pread(mine, PIECE, at) for at in starts))
        again = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - closed in close()
        self._file.close()
        self._file = again
        self.say(f"warning: {self.path} was removed or replaced; it is written again{aside}")

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _draw(self, numbers: dict[str, float], step: int) -> None:
        if self._board is None:
            return
        try:
            self._board.add(numbers, step)
        except OSError as problem:
            self.say(f"warning: TensorBoard gets no more points of this start: {problem}")
            self._close_board()

    def _close_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()

    def close(self) -> None:
        """Flush and end; safe to call twice."""
        if not self.active:
            return
        if self._progress is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._progress.stop()
            self._progress = None
        if self._file is not None:
            with contextlib.suppress(OSError):  # then no checkpoint is of these lines' steps
                self._write_waiting()
            self._file.close()
            self._close_board()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and value - value != 0 else value
        for key, value in record.items()
    }
