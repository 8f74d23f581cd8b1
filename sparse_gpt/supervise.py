"""Run a command, such as `deepspeed ... launch/pretrain.py CONFIG`, again until it is done.

A signal goes on to the ranks alone: the launcher between would kill them after 30 s. Linux only.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

import psutil

from sparse_gpt.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from sparse_gpt.train.signals import SIGNALS

POLL_SECONDS = 0.2
SECOND_SIGNAL_SECONDS = 5.0  # for the ranks to end after a second signal
OTHERS_GRACE = 5.0  # for processes that are no ranks
MAX_BACKOFF = 300.0
PR_SET_PDEATHSIG = 1


@dataclass
class Supervisor:
    """Starts `command`, and again after failures; one session of processes at a time.

    `restarts` of them at most in any `window` seconds, each after a pause that doubles from
    `backoff` seconds. Exit codes 0 and 2 (a user's error) are final; 75 (stopped) is unless
    `restart_stopped`. `grace`: seconds for ranks that outlive their launcher.
    """

    command: Sequence[str]
    restarts: int = 5
    window: float = 3600.0
    backoff: float = 5.0
    restart_stopped: bool = False
    grace: float = 60.0
    received: list[int] = field(default_factory=list)
    _starts: list[float] = field(default_factory=list)

    def run(self) -> int:
        """The exit code of the last start; 75 where a signal came before the first rank did."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        while True:
            code = self._run_once()
            if self.received or code in (0, EXIT_USER_ERROR):
                return code
            if code == EXIT_STOPPED and not self.restart_stopped:
                return code
            now = time.monotonic()
            self._starts = [at for at in self._starts if now - at < self.window]
            if len(self._starts) >= self.restarts:
                if self.restarts:
                    self._say(
                        f"ended with {code}; not started again: {self.restarts} restarts in "
                        f"{self.window / 60:g} minutes"
                    )
                return code
            pause = min(self.backoff * 2 ** len(self._starts), MAX_BACKOFF)
            self._say(
                f"ended with {code}; restart {len(self._starts) + 1} of {self.restarts} in "
                f"{pause:g} s"
            )
            self._starts.append(now)
            while time.monotonic() < now + pause:
                if self.received:
                    return EXIT_STOPPED
                time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def _say(self, text: str) -> None:
        print(f"supervise: {text}", file=sys.stderr, flush=True)

    def _run_once(self) -> int:
        try:
            child = subprocess.Popen(
                self.command, start_new_session=True, preexec_fn=_die_with_parent
            )
        except OSError as error:
            raise UserError(f"cannot start {self.command[0]}: {error.strerror}") from None
        session, told, handled, early = child.pid, set(), 0, False
        while child.poll() is None:
            if len(self.received) > handled:
                handled, told = handled + 1, set()
                if handled == 1 and not _ranks(session):
                    early = True  # nothing is trained yet
                    _send(_session(session), signal.SIGTERM)
                elif handled == 2:
                    second = time.monotonic()
            if handled and not early:
                self._pass_on(session, told, self.received[handled - 1])
            if handled >= 2 and time.monotonic() - second > SECOND_SIGNAL_SECONDS:
                _send(_session(session), signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        left = self._wait_for_the_rest(session, 0.0 if early else self.grace)
        if early:
            return EXIT_STOPPED
        code = child.returncode
        if code < 0:
            return 128 - code
        return 1 if left and code == 0 else code

    def _pass_on(self, session: int, told: set[int], number: int) -> None:
        """To each rank once, as soon as it listens."""
        for rank in _ranks(session):
            if rank.pid not in told and _catches(rank.pid, number):
                told.add(rank.pid)
                _send([rank], number)

    def _wait_for_the_rest(self, session: int, grace: float) -> bool:
        """Until nothing of the session is alive; what is left then is killed. Whether any was."""
        began, was_left = time.monotonic(), False
        while processes := _session(session):
            ranks = bool(_ranks(session))
            was_left |= ranks
            if time.monotonic() - began > (grace if ranks else min(grace, OTHERS_GRACE)):
                was_left = True
                _send(processes, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        return was_left


def _die_with_parent() -> None:
    """In the child: a SIGTERM when the supervisor is killed. Its ranks see that and stop."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _session(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone meanwhile
    return found


def _ranks(session: int) -> list[psutil.Process]:
    """Those of them that are ranks, without children of ranks."""
    ranks: dict[int, tuple[psutil.Process, int]] = {}
    for process in _session(session):
        try:
            if "RANK" in process.environ():
                ranks[process.pid] = (process, process.ppid())
        except psutil.Error:
            continue
    return [process for process, parent in ranks.values() if parent not in ranks]


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: before it has, the signal would kill it."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            caught = next(line for line in status if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _send(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
