"""Run a command, such as `deepspeed ... launch/pretrain.py CONFIG`, again until it is done.

A signal goes on to the ranks alone: the launcher between would kill them after 30 s. Linux only.
"""

import contextlib
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

from sparse_gpt.errors import EXIT_STOPPED, FINAL, UserError
from sparse_gpt.train.signals import BURST, Asked, heeded

POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0  # between two looks for ranks, once there are some
SECOND_REQUEST_SECONDS = 5.0  # for the ranks to end after a second request
OTHERS_GRACE = 5.0  # for processes that are no ranks
MAX_BACKOFF = 300.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Supervisor:
    """Starts `command`, and again after failures; one session of processes at a time.

    `restarts` of them at most in any `window` seconds, each after a pause that doubles from
    `backoff` seconds. Exit codes 0, 2 (a user's error) and 76 (stopped for good) are final; 75
    (stopped) is unless `restart_stopped`. `grace`: seconds for ranks that outlive their launcher.
    All children of this process are taken for its own.
    """

    command: Sequence[str]
    restarts: int = 5
    window: float = 3600.0
    backoff: float = 5.0
    restart_stopped: bool = False
    grace: float = 60.0
    requests: list[int] = field(default_factory=list)  # the signal of each
    _asked: Asked = field(default_factory=Asked)
    _second: float = 0.0  # when the second one was seen
    _told: dict[int, list[float]] = field(default_factory=dict)  # when, by process
    _starts: list[float] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)  # ranks of this start
    _looked: float = 0.0

    def run(self) -> int:
        """The exit code of the last start; 75 where a signal came before the first rank did."""
        for number in heeded():
            signal.signal(number, self._on_signal)
        # Ranks whose launcher is killed become children of this process, which learns how they end.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        while True:
            code = self._run_once()
            if self.requests or code in FINAL:
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
                if self.requests:
                    return EXIT_STOPPED
                time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked.again() or not self.requests:
            self.requests.append(number)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"supervise: {text}", file=sys.stderr, flush=True)

    def _run_once(self) -> int:
        try:
            child = subprocess.Popen(
                self.command, start_new_session=True, preexec_fn=_die_with_parent
            )
        except OSError as error:
            raise UserError(f"cannot start {self.command[0]}: {error.strerror}") from None
        session, early, self._seen = child.pid, False, set()
        while child.poll() is None:
            self._look_for_ranks(session)
            if self.requests and not self._told and not early and not _ranks(session):
                early = True  # nothing is trained yet
                _send(_session(session), signal.SIGTERM)
            self._heed(session, early)
            time.sleep(POLL_SECONDS)
        lost = self._wait_for_the_rest(session, early)
        if early:
            return EXIT_STOPPED
        code = child.returncode
        if code < 0:
            return 128 - code
        return 1 if lost and code == 0 else code

    def _heed(self, session: int, early: bool) -> None:
        """Pass requests on to the ranks; after a second one kill what does not end."""
        if self.requests and not early:
            self._pass_on(session)
        if len(self.requests) > 1:
            self._second = self._second or time.monotonic()
            if time.monotonic() - self._second > SECOND_REQUEST_SECONDS:
                _send(_session(session), signal.SIGKILL)

    def _pass_on(self, session: int) -> None:
        """Each request once to each rank, as soon as it listens and takes it for another one."""
        for rank in _ranks(session):
            now, told = time.monotonic(), self._told.setdefault(rank.pid, [])
            if len(told) == len(self.requests) or (told and now - told[-1] < BURST + POLL_SECONDS):
                continue
            number = self.requests[len(told)]
            if _catches(rank.pid, number):
                told.append(now)
                _send([rank], number)

    def _wait_for_the_rest(self, session: int, early: bool) -> bool:
        """Until nothing of the session is alive, at most `grace`; what is left then is killed.

        Whether the launcher left ranks, or a rank failed, or anything had to be killed.
        """
        began, lost = time.monotonic(), False
        grace = 0.0 if early else self.grace
        while processes := _session(session):
            ranks = bool(_ranks(session))
            lost |= ranks
            if time.monotonic() - began > (grace if ranks else min(grace, OTHERS_GRACE)):
                lost = True
                _send(processes, signal.SIGKILL)
            self._heed(session, early)
            time.sleep(POLL_SECONDS)
        return self._orphan_failed() or lost

    def _look_for_ranks(self, session: int) -> None:
        """Remember them: of a process that has ended nothing tells that it was one."""
        now = time.monotonic()
        if not self._seen or now - self._looked > LOOK_SECONDS:
            self._seen |= {rank.pid for rank in _ranks(session)}
            self._looked = now

    def _orphan_failed(self) -> bool:
        """Whether a rank that the launcher left behind did not end with 0."""
        failed = False
        with contextlib.suppress(ChildProcessError):  # there is no other one
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                failed |= ended[0] in self._seen and ended[1] != 0
        return failed


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
