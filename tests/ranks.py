"""Real gloo ranks for tests: `run_ranks(world_size, fn, *args)` calls `fn` in every rank.

    def total(rank_offset):
        value = torch.tensor([float(torch.distributed.get_rank() + rank_offset)])
        torch.distributed.all_reduce(value)
        return value.item()

    def test_total():
        assert run_ranks(2, total, 1) == [3.0, 3.0]

There is one pool of persistent processes a world size, started when first used. `fn` is a
module-level function of a test module or of the library; arguments and results are pickled.
Every call starts with the same random state, environment, folder and default dtype, while the
process group stays initialised. After a failure or a timeout the pool is ended and built anew
when next used. A test that builds a DeepSpeed engine ends with `cleanup_engine(engine)`.
"""

import atexit
import contextlib
import gc
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_WORLD_SIZE = 8
MAX_POOLS = 3  # alive at once; the one unused for longest is ended first
START_SECONDS = 120.0
GRACE_SECONDS = 2.0  # for the other ranks to report too, once one has failed
LOG_TAIL = 3000


class RankError(AssertionError):
    """A rank failed, died or did not answer; `tracebacks` maps rank to what it said."""

    def __init__(self, message: str, tracebacks: dict[int, str]):
        super().__init__(message)
        self.tracebacks = tracebacks


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_environment() -> dict[str, str]:
    """Environment variables for processes of tests that compute on the CPU, offline."""
    return {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }


class _Host:
    """The process that ranks are forked from; see `rank_host.py`."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="sparse_gpt_ranks_")
        self.log = Path(self.folder.name) / "host.log"
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.log.open("ab") as log:
            self.process = subprocess.Popen(
                # -P: the tests folder does not become an import path of the ranks
                [sys.executable, "-P", str(ROOT / "tests/rank_host.py"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | cpu_environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.control.settimeout(START_SECONDS)
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> dict[str, Any]:
        message = self.control.recv(1 << 16)
        if not message:
            raise RuntimeError(f"the host of the test ranks died:\n{_tail(self.log)}")
        return json.loads(message)

    def fork(self, environment: dict[str, str], init_method: str, data: int, log: int) -> int:
        request = {"op": "fork", "environment": environment, "init_method": init_method}
        socket.send_fds(self.control, [json.dumps(request).encode()], [data, log])
        return self._receive()["pid"]

    def end(self, pids: list[int]) -> dict[int, int]:
        self.control.send(json.dumps({"op": "end", "pids": pids}).encode())
        return {int(pid): status for pid, status in self._receive()["status"].items()}

    def close(self) -> None:
        self.control.close()  # ends every rank, then the host
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


@dataclass
class _Pool:
    host: _Host
    world_size: int
    folder: Path
    connections: list[Connection] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    def start(self) -> None:
        shared = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        for rank in range(self.world_size):
            ours, theirs = socket.socketpair()
            self.connections.append(Connection(ours.detach()))
            # "a": what a rank truncates must not come back as zeros
            with theirs, self.log(rank).open("ab") as log:
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # The ranks meet in a file, so no port can be taken by somebody else meanwhile.
                meet = f"file://{self.folder / 'meet'}"
                self.pids.append(self.host.fork(environment, meet, theirs.fileno(), log.fileno()))
        self.collect("starting the ranks", "ready", START_SECONDS)

    def log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def send(self, request: dict[str, Any]) -> None:
        message = pickle.dumps(request)
        for connection in self.connections:
            # A rank that died meanwhile is reported by `collect`.
            with contextlib.suppress(BrokenPipeError):
                connection.send_bytes(message)

    def collect(self, what: str, kind: str, timeout: float) -> list[dict[str, Any]]:
        """One answer of this kind from every rank; RankError otherwise."""
        answers: dict[int, dict[str, Any]] = {}
        failed: dict[int, dict[str, Any]] = {}
        waiting = dict(zip(self.connections, range(self.world_size), strict=True))
        deadline = time.monotonic() + timeout
        timed_out = False
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                timed_out = not failed
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answer = pickle.loads(connection.recv_bytes())  # noqa: S301 - our own rank
                except (EOFError, ConnectionResetError):
                    answer = {"kind": "died", "traceback": "the process died"}
                answers[rank] = answer
                if answer["kind"] != kind:
                    failed[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not failed and not timed_out:
            return [answers[rank] for rank in range(self.world_size)]
        hung = sorted(waiting.values())
        self._raise(what, failed, hung, timeout)
        raise AssertionError("unreachable")

    def _raise(
        self, what: str, failed: dict[int, dict[str, Any]], hung: list[int], timeout: float
    ) -> None:
        said = {rank: answer["traceback"] for rank, answer in failed.items()}
        if hung:  # their Python stacks go to their logs
            for rank in hung:
                os.kill(self.pids[rank], signal.SIGUSR1)
            time.sleep(0.3)
        status = self.host.end(self.pids)
        for rank, answer in failed.items():
            if answer["kind"] == "died":
                said[rank] = f"the process died with exit status {status[self.pids[rank]]}"
        for rank in hung:
            reason = "still waiting" if failed else f"no answer within {timeout:g} s"
            said[rank] = f"{reason}; its stack is in the log"
        self.pids = []
        lines = [f"{what}: rank {', '.join(map(str, sorted(failed) or hung))} failed"]
        for rank in sorted(said):
            lines.append(f"----- rank {rank} of {self.world_size}: {said[rank].rstrip()}")
            if log := _tail(self.log(rank)):
                lines.append(f"----- rank {rank}, end of its log:\n{log}")
        first = next((failed[r]["error"] for r in sorted(failed) if failed[r].get("error")), None)
        cause = pickle.loads(first) if first else None  # noqa: S301 - our own rank
        raise RankError("\n".join(lines), said) from cause

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        if self.pids:
            self.host.end(self.pids)
            self.pids = []


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return text.strip()[-LOG_TAIL:]


_host: _Host | None = None
_pools: OrderedDict[int, _Pool] = OrderedDict()
_built = 0


def _pool(world_size: int) -> _Pool:
    global _host, _built
    if _host is not None and _host.process.poll() is not None:
        close_pools()
    if _host is None:
        _host = _Host()
    if world_size in _pools:
        _pools.move_to_end(world_size)
        return _pools[world_size]
    while len(_pools) >= MAX_POOLS:
        _pools.popitem(last=False)[1].close()
    _built += 1
    folder = Path(_host.folder.name) / f"pool{_built}"
    folder.mkdir()
    pool = _Pool(_host, world_size, folder)
    try:
        pool.start()
    except BaseException:
        pool.close()
        raise
    _pools[world_size] = pool
    return pool


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    /,
    *args: Any,
    timeout_seconds: float = 240.0,
    **kwargs: Any,
) -> list[Any]:
    """`fn(*args, **kwargs)` in each of `world_size` ranks (1 to 8); the results in rank order.

    `fn` must be a module-level function; it finds its rank by `torch.distributed.get_rank()` or
    in the environment (RANK, LOCAL_RANK, WORLD_SIZE). What it prints is kept and shown with a
    failure.

    Raises:
        RankError: with rank numbers and tracebacks, if a rank raised, died, or did not answer in
            `timeout_seconds`. Its `__cause__` is the first failing rank's own exception where
            that can be pickled. The pool is then ended; the next call builds another.
        ValueError: if `fn` cannot be found by name in another process.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {world_size}; it must be 1 to {MAX_WORLD_SIZE}")
    module = sys.modules[fn.__module__]
    path = getattr(module, "__file__", None)
    if path is None or "<" in fn.__qualname__:
        raise ValueError(f"{fn.__qualname__} is not a module-level function of a file")
    request = {
        "module": fn.__module__,
        "path": path,
        "qualname": fn.__qualname__,
        # Plain pickle: multiprocessing's would put tensors into /dev/shm.
        "arguments": pickle.dumps((args, kwargs)),
    }
    pool = _pool(world_size)
    try:
        pool.send(request)
        answers = pool.collect(fn.__qualname__, "result", timeout_seconds)
    except BaseException:  # KeyboardInterrupt and a test's own timeout too: the ranks are busy
        _pools.pop(world_size, None)
        pool.close()
        raise
    return [answer["value"] for answer in answers]


def close_pools() -> None:
    """End every rank and the host; the next `run_ranks` starts over."""
    global _host
    host, _host = _host, None
    for pool in _pools.values():
        pool.pids = []  # the host ends them
        pool.close()
    _pools.clear()
    if host is not None:
        host.close()


atexit.register(close_pools)


def cleanup_engine(engine: Any) -> None:
    """Free a DeepSpeed engine inside a rank, so that the next one starts clean.

    Call it at the end of a test function (in `finally` where the pool should survive) and keep
    no reference to the engine, its optimizer or its module afterwards.
    """
    from sparse_gpt.train.engine import free_engine

    free_engine(engine)
    gc.collect()
