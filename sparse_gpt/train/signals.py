"""Requests to stop a run: signals, a STOP file, a deadline, a launcher that is gone.

A request is a flag. The ranks exchange their flags with the numbers of every step, so that all
stop after the same one, with a checkpoint and exit code 75 (`sparse_gpt.errors.Stopped`), or 76
where the next start would be stopped, too. Before the ranks have met there is nothing to agree on
or to save: a request ends the process at once, with 75.
Imports neither torch nor deepspeed: an entry point listens before they load.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOP_FILE = "STOP"
# What a rank may ask for, in the order of the flags it exchanges.
FILES = (f"the file {STOP_FILE} in the run folder",)
DEADLINE = "the deadline"
REASONS = (*(s.name for s in SIGNALS), *FILES, DEADLINE, "a lost launcher")
# A Ctrl-C reaches a rank from the terminal, and once more from the launcher that it reaches too:
# signals this close together (seconds) are one request.
BURST = 1.0
LOOK_SECONDS = 0.5  # between two looks at the STOP file and the launcher


def heeded() -> list[signal.Signals]:
    """Those of `SIGNALS` to handle: all, but SIGHUP where nohup has it ignored."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not nohup]


class Asked:
    """How often signals have asked to stop: all in a burst are one request."""

    def __init__(self) -> None:
        self.first: float | None = None  # time.monotonic()

    def again(self) -> bool:
        """Count a signal that has come now; whether it asks a second time."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        return now - self.first > BURST


class _Process:
    """What this process has been told by signals, and by the end of what launched it."""

    def __init__(self) -> None:
        self.received: set[signal.Signals] = set()
        self.started: float | None = None  # seconds since the epoch
        self.asked = Asked()
        self.met = False  # the other ranks: what is asked is agreed on with them
        self.ended = False  # the run has stopped: nothing is left to save
        self.exit_code = EXIT_STOPPED
        self.step = 0
        self.launcher: psutil.Process | None = None
        self.runner = 1

    def listen(self) -> None:
        """Install the handlers. From the main thread, once.

        A thread reads what arrives: the main one may be inside an exchange that never returns.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in heeded():
            signal.signal(number, _noted_by_the_thread)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()
        try:
            parent = psutil.Process(os.getppid())
            if "deepspeed.launcher.launch" in parent.cmdline():
                self.launcher, self.runner = parent, parent.ppid()
        except psutil.Error:  # no process of ours to see: in a container, behind hidepid
            return

    def _read(self, descriptor: int) -> None:
        while True:
            wait = None if self.met else LOOK_SECONDS
            if select.select([descriptor], [], [], wait)[0]:
                for number in os.read(descriptor, 64):
                    if number in SIGNALS:
                        self._on_signal(signal.Signals(number))
            elif not self.met and self.lost_launcher():
                self._end_early(REASONS[-1])

    def _end_early(self, reason: str) -> NoReturn:
        _say(f"{reason}: ended at once, before the ranks have met; nothing was trained")
        os._exit(EXIT_STOPPED)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.ended:
            os._exit(self.exit_code)
        if not self.met:
            self._end_early(number.name)
        first, again = not self.received, self.asked.again()
        self.received.add(number)
        if first:
            if os.environ.get("RANK", "0") == "0":
                when = "after this step and saves what it trained"
                when = when if self.step else "before its first step"
                _say(f"{number.name}: the run stops {when}; a second signal ends it at once")
        elif again:
            _say(
                f"{number.name} again: ended at once "
                + (f"in step {self.step}" if self.step else "before its first step")
                + "; a later start goes on from the last checkpoint"
            )
            os._exit(128 + number)

    def lost_launcher(self) -> bool:
        """Whether `deepspeed`, or the process that it starts on each node, has ended."""
        if self.launcher is None:
            return False
        try:
            now = self.launcher.ppid()
        except psutil.NoSuchProcess:
            return True
        return os.getppid() != self.launcher.pid or now != self.runner


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    """A signal without a Python handler would not be written to the wakeup descriptor."""


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(f"[rank {rank}] {text}\n", end="", file=sys.stderr, flush=True)


_process = _Process()


def listen() -> None:
    """From now on signals are requests to stop. For entry points; from the main thread.

    The command counts as started now, before its slow imports.
    """
    _process.started = time.time()
    _process.listen()


def met() -> None:
    """The ranks have met: from now on what is asked waits until they agree on it."""
    _process.met = True


def started() -> float:
    """When this process began to listen, in seconds since the epoch; now, where it does not."""
    return time.time() if _process.started is None else _process.started


@dataclass(frozen=True)
class Command:
    """What the user started and knows, which may make several runs: asked to stop, all of it does.

    `started`: seconds since the epoch; a deadline in minutes counts from it.
    """

    run_dir: Path
    started: float = field(default_factory=started)


class StopRequests:
    """The reasons that this rank has for stopping one run."""

    def __init__(
        self, run_dir: Path, deadline: float | None, first_rank: bool, also: Path | None = None
    ) -> None:
        """`deadline`: seconds since the epoch. Only the first rank looks for the STOP file.

        `also`: another folder to look in, that of a command of several runs.
        """
        folders = (run_dir, also or run_dir) if first_rank else ()
        self.stop_files = {folder / STOP_FILE for folder in folders}
        self.deadline = deadline
        self._looked, self._found = 0.0, [False, False]
        self.begin(0)  # of this run there was no step yet

    def begin(self, step: int) -> None:
        """Name the step being made, should the process end at once in it."""
        _process.step = step

    def flags(self) -> list[float]:
        """One number for each of `REASONS`: 1.0 where this rank asks to stop."""
        now = time.monotonic()
        if not self._looked or now - self._looked >= LOOK_SECONDS:
            self._looked = now
            there = False
            with contextlib.suppress(OSError):  # of a network file system: looked for again soon
                there = any(file.exists() for file in self.stop_files)
            self._found = [there, _process.lost_launcher()]
        late = self.deadline is not None and time.time() >= self.deadline
        asked = [number in _process.received for number in SIGNALS]
        return [float(flag) for flag in (*asked, self._found[0], late, self._found[1])]

    def end(self, code: int) -> None:
        """The run has stopped and is saved: a signal may now end the process at once, with this
        exit code."""
        _process.exit_code, _process.ended = code, True


def code_of(counts: Sequence[float], deadline: float | str | None) -> int:
    """The exit code, from the sum of all ranks' flags and `checkpoint.deadline`.

    A STOP file, and a time of the calendar that has come, would stop the next start, too.
    """
    lasting = {*FILES} | (
        {DEADLINE} if isinstance(deadline, str) and deadline != "slurm" else set()
    )
    reasons = {reason for reason, count in zip(REASONS, counts, strict=True) if count}
    return EXIT_STOPPED_FOR_GOOD if reasons & lasting else EXIT_STOPPED


def describe(counts: Sequence[float], world_size: int) -> str:
    """The reasons in words, from the sum of all ranks' flags."""
    asked = [(reason, int(count)) for reason, count in zip(REASONS, counts, strict=True) if count]
    return ", ".join(
        f"{reason} (remove it first)"
        if reason in FILES
        else f"{reason} ({many} of {world_size} ranks)"
        for reason, many in asked
    )


def deadline_of(value: float | str | None, margin: float, started: float) -> float | None:
    """When to stop, in seconds since the epoch: `margin` minutes before the deadline.

    `value`: minutes from `started` (seconds since the epoch), an ISO time (local where it has no
    offset), or `slurm`: the end of the job's time. Raises `UserError` where slurm says none.
    """
    if value is None:
        return None
    if isinstance(value, str) and value == "slurm":
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if not end.isdigit():
            raise UserError(
                f"checkpoint.deadline: slurm, but SLURM_JOB_END_TIME is {end!r}; start it in a job "
                "of slurm 22.05 or newer, or give minutes or a time"
            )
        at = float(end)
    elif isinstance(value, str):
        at = datetime.fromisoformat(value).timestamp()
    else:
        at = started + 60 * value
    return at - 60 * margin
