"""Ranks that die or hang: the others learn which, and end.

Rank 0 keeps a small store. Every rank writes a sign of life there once a second, and looks for a
verdict: the one text that says which rank was lost, or what was wrong on one alone. Ranks of one
node see each other's processes, so that one which is killed is named within seconds; a node that
is lost has been silent for `timeouts.silence`; a rank that hangs has made no headway for
`timeouts.progress`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sparse_gpt.config import TimeoutsConfig
from sparse_gpt.errors import Stopped, TryAgain, UserError
from sparse_gpt.train import signals

BEAT_SECONDS = 1.0
GRACE_SECONDS = 5.0  # for the main thread to end by itself, once there is a verdict
EXPLAIN_SECONDS = 6.0  # after a failed exchange, to find its reason; then as long again
QUIET_SECONDS = 4.0  # without a sign of life, after such an exchange
TELL_SECONDS = 8.0  # for a finding to reach the store
HEAR_SECONDS = 3.0  # for the others to read a verdict, before rank 0 ends and its store with it
HASTE_SECONDS = 0.1  # between two looks at the store, once something was found
OWN_DELAY = 5.0  # a thread that slept longer than that was itself not let run
EXIT_LOST = 1
VERDICT = "verdict"


class LostRank(RuntimeError):
    """An exchange failed because of another rank; the message names it."""

    code = EXIT_LOST


KINDS = {kind.__name__: kind for kind in (LostRank, UserError, TryAgain)}  # of a verdict


class Watch:
    """Watches the ranks of one run, as a context around it. Entering and leaving are collectives.

    Leaving by an exception tells the other ranks of it, or waits for what they found: a `LostRank`,
    or a `UserError` where that was one. Within itself the context changes nothing. A rank that is
    alone watches its own headway. Once it is entered, the ranks agree on when to stop.
    """

    def __init__(self, timeouts: TimeoutsConfig) -> None:
        self.timeouts = timeouts
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = 0  # the one being made
        self._since, self._counts = time.monotonic(), False
        self._finding = self._verdict = ""  # what this rank found; what all have agreed on
        self._kind: type[LostRank | UserError] = LostRank  # what goes with it
        self._found, self._done = threading.Event(), threading.Event()
        self._heard_by_all = threading.Event()  # rank 0: of the verdict
        self._threads: list[threading.Thread] = []
        self._depth = 0

    def mark(self) -> None:
        """The main thread has made headway; the next mark, or rest, is due in `progress`."""
        self._since, self._counts = time.monotonic(), True

    def rest(self) -> None:
        """What follows may take any time, such as a save, until others wait in a step."""
        self._since, self._counts = time.monotonic(), False

    def __enter__(self) -> "Watch":
        self._depth += 1
        if self._depth > 1:
            return self
        self._main, self._looked = threading.get_ident(), time.monotonic()
        self._finding = self._verdict = ""
        self._kind = LostRank
        for event in (self._found, self._done, self._heard_by_all):
            event.clear()
        if self.world_size == 1:
            self._nodes: list[Any] = [(socket.gethostname(),)]
            self._start(self._look_at_itself)
            signals.met()
            return self
        self._store = self._open_store()
        me = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._nodes = [None] * self.world_size
        dist.all_gather_object(self._nodes, me)
        self._peers = _peers(self._nodes, self.rank)
        self._answered = time.monotonic()
        self._heard = [self._answered] * self.world_size  # rank 0: of the last new sign of life
        self._signs = [""] * self.world_size
        self._start(self._beat, self._judge)
        signals.met()
        return self

    def _start(self, *targets: Callable[[], None]) -> None:
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
            for target in targets
        ]
        for thread in self._threads:
            thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        if error is None or isinstance(error, Stopped):
            self._leave()
            return
        if self.world_size > 1:
            self._explain(error)
        self._done.set()

    def _leave(self) -> None:
        """Once all have come so far: until then each gives its signs of life, and is watched."""
        self.rest()
        try:
            dist.barrier()
        except RuntimeError as failed:
            self._explain(failed)
            self._done.set()
            raise
        self._done.set()
        for thread in self._threads:
            thread.join()
        dist.barrier()  # rank 0's store is the last to go

    def _explain(self, error: BaseException) -> None:
        if not _is_lost_exchange(error):
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if isinstance(error, UserError):  # one that all raise is told by the first
                what = str(error)
                self._kind = TryAgain if isinstance(error, TryAgain) else UserError
            self._finding = f"{self._name(self.rank)} failed {_in_step(self.step)}: {what}"
            self._found.wait(TELL_SECONDS)
            self._wait_until_heard()
            return
        if not self._found.wait(EXPLAIN_SECONDS):
            silent = [
                r for r, at in enumerate(self._heard) if time.monotonic() - at > QUIET_SECONDS
            ]
            if self.rank == 0 and silent:
                names = ", ".join(self._name(rank) for rank in silent)
                self._finding = (
                    f"an exchange failed, and there is no sign of life of {names}"
                    f"{self._last_step(silent[0])}"
                )
            self._found.wait(EXPLAIN_SECONDS)
        if self._found.is_set():
            self._wait_until_heard()
            self._done.set()
            raise self._kind(self._verdict) from error
        error.add_note("no rank was found to have ended or to hang")

    def _wait_until_heard(self) -> None:
        if self.rank == 0:
            self._heard_by_all.wait(HEAR_SECONDS)

    def _open_store(self) -> Any:
        timeout, address = timedelta(seconds=self.timeouts.silence), os.environ["MASTER_ADDR"]
        store: Any = None
        port = [0]
        if self.rank == 0:
            store = TCPStore(
                "localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            port = [store.port]
        dist.broadcast_object_list(port)
        if self.rank:
            store = TCPStore(
                address, port[0], is_master=False, wait_for_workers=False, timeout=timeout
            )
        return store

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._nodes[rank][0]}"

    def _settle(self, text: str, kind: type[LostRank | UserError] = LostRank) -> None:
        if not self._found.is_set():
            self._verdict, self._kind = text, kind
            self._found.set()

    # The thread that talks to the store: alone, for a store that is frozen answers nobody.

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(HASTE_SECONDS if self._finding else BEAT_SECONDS):
            count += 1
            self._allow_for_stops()
            try:
                self._store.set(f"sign/{self.rank}", json.dumps({"count": count, **self._sign()}))
                self._agree()
                if self.rank == 0:
                    self._read_signs()
            except (dist.DistError, RuntimeError):
                if not self._done.is_set():
                    last = self._last_step(0) + (" or before" if self.step else "")
                    self._settle(self._finding or f"{self._name(0)} has ended{last}", self._kind)
                return
            self._answered = time.monotonic()

    def _agree(self) -> None:
        """Tell or learn the verdict; rank 0 looks for who has heard it."""
        if self._finding:
            verdict = json.dumps([self._finding, self._kind.__name__])
            said = self._store.compare_set(VERDICT, "", verdict)
        elif self._store.check([VERDICT]):
            said = self._store.get(VERDICT)
        else:
            return
        text, kind = json.loads(said)
        self._finding = self._finding or text
        self._store.set(f"heard/{self.rank}", "")
        self._settle(text, KINDS[kind])
        if self.rank == 0 and all(self._knows(rank) for rank in range(self.world_size)):
            self._heard_by_all.set()

    def _knows(self, rank: int) -> bool:
        """Whether a rank has heard the verdict, or never will."""
        ended = rank in self._peers and _has_ended(self._peers[rank])
        silent = time.monotonic() - self._heard[rank] > QUIET_SECONDS
        return ended or silent or self._store.check([f"heard/{rank}"])

    def _allow_for_stops(self) -> None:
        """While this process was stopped (Ctrl-Z, a suspended job), its main thread was, too."""
        now = time.monotonic()
        if now - self._looked > OWN_DELAY:
            self._since += now - self._looked
        self._looked = now

    def _sign(self) -> dict[str, Any]:
        idle = time.monotonic() - self._since
        if idle <= self.timeouts.progress:
            return {"step": self.step}
        where = describe_place(sys._current_frames().get(self._main))
        return {"step": self.step, "idle": idle, "counts": self._counts, "where": where}

    def _read_signs(self) -> None:
        keys = [f"sign/{rank}" for rank in range(self.world_size)]
        there = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in there])
        for rank, value in zip(there, values, strict=True):
            if (sign := value.decode()) != self._signs[rank]:
                self._signs[rank], self._heard[rank] = sign, time.monotonic()

    # The thread that judges, and ends the process.

    def _look_at_itself(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._allow_for_stops()
            if found := self._stuck({0: self._sign()}):
                self._settle(found)
                self._end()
                return

    def _judge(self) -> None:
        before = time.monotonic()
        since = None
        while not self._done.wait(BEAT_SECONDS / 2):
            now = time.monotonic()
            if now - before > OWN_DELAY:  # this process was stopped: nobody else was silent
                self._answered = now
                self._heard = [now] * self.world_size
            before = now
            if self._found.is_set():
                self._end()
                return
            if not self._finding:
                self._finding = self._look(now)
            if self._finding:
                since = since or now
                if now - since > TELL_SECONDS:  # nobody could be told
                    self._settle(self._finding)

    def _look(self, now: float) -> str:
        silence = self.timeouts.silence
        for rank, process in self._peers.items():
            if _has_ended(process):
                return f"{self._name(rank)} has ended{self._last_step(rank)}"
        if now - self._answered > silence:
            return f"{self._name(0)} has not answered for {silence:g} s"
        if self.rank:
            return ""
        for rank, heard in enumerate(self._heard):
            if now - heard > silence:
                return (
                    f"{self._name(rank)} has given no sign of life for {silence:g} s "
                    f"(timeouts.silence){self._last_step(rank)}"
                )
        signs = enumerate(self._signs)
        return self._stuck({rank: json.loads(sign) for rank, sign in signs if sign})

    def _last_step(self, rank: int) -> str:
        sign = self._signs[rank]
        step = json.loads(sign)["step"] if sign else self.step  # only rank 0 reads them
        return f"; the last step was {step}" if step else ", before its first step"

    def _stuck(self, signs: dict[int, dict[str, Any]]) -> str:
        idle = {rank: sign for rank, sign in signs.items() if "idle" in sign}
        # Where a rank makes headway, the others wait for it; and all must have said where they are.
        if len(idle) < len(signs) or not any(sign["counts"] for sign in idle.values()):
            return ""
        outside = [rank for rank, sign in idle.items() if not sign["where"]["exchange"]]
        named = outside or list(idle)
        places = "; ".join(
            f"{self._name(rank)} is in {idle[rank]['where']['place']}" for rank in named[:8]
        )
        others = len(idle) - len(named)
        rest = f"; {others} others wait in an exchange" if others else ""
        step = min(sign["step"] for sign in idle.values())
        where = f"step {step}" if step else "the start"
        return (
            f"{where} has made no headway for {self.timeouts.progress:g} s (timeouts.progress): "
            f"{places}{rest}"
        )

    def _end(self) -> None:
        if self._done.wait(GRACE_SECONDS):
            return
        with contextlib.suppress(OSError):  # whoever read it may be gone
            said = f"[rank {self.rank}] error: {self._verdict}\n"
            print(said, end="", file=sys.stderr, flush=True)  # in one write, see run_main
        os._exit(self._kind.code)


def _in_step(step: int) -> str:
    return f"in step {step}" if step else "before its first step"


def describe_place(frame: FrameType | None) -> dict[str, Any]:
    """Where a thread is: `place`, and whether it waits in an exchange with other ranks."""
    place, exchange, in_library, depth = "", False, False, 0
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        exchange |= depth < 12 and ("/torch/distributed/" in file or "/deepspeed/comm/" in file)
        library = "/site-packages/" in file or "/lib/python" in file
        if not place or (in_library and not library):  # the innermost that is not a library's
            place, in_library = f"{file}:{frame.f_lineno} {frame.f_code.co_name}", library
        frame, depth = frame.f_back, depth + 1
    return {"place": place or "no Python code", "exchange": exchange}


def _peers(nodes: list[Any], rank: int) -> dict[int, psutil.Process]:
    """The other ranks of this node, as far as their processes can be seen from here."""
    peers = {}
    for other, (host, pid, began) in enumerate(nodes):
        if other == rank or host != nodes[rank][0]:
            continue
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - began) < 1.0:  # not another container's number
                peers[other] = process
        except psutil.Error:
            continue  # left to its signs of life
    return peers


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_lost_exchange(error: BaseException) -> bool:
    """Whether an exception is an exchange that failed, because of any rank."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
