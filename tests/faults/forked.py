"""Children of the ranks of a test, forked at any place: they go on from there, and may be killed.

A forked child has its parent's memory, so everything that a run has built, but none of its
threads. It joins the other ranks' children in a process group of their own.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
FAILED = 9  # exit code: the action raised, as it does where another rank has died


def fork(action: Callable[[], Any], meet: Path) -> tuple[int, int]:
    """Start `action` in a child of each rank. A collective of the children, who meet in `meet`.

    Returns the child's number, and a descriptor that can be read once it has joined the others.
    """
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = FAILED
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(FAILED)
        _join(meet)
        os.write(writer, b".")
        action()
        code = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            print(f"child {os.getpid()}: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def _join(meet: Path) -> None:
    """A new default group in the place of the parent's, whose threads are not here."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    c10d: Any = distributed_c10d  # its private parts: there is no public way
    rank, world_size = dist.get_rank(), dist.get_world_size()
    kept.append(c10d._world.default_pg)  # its destructor would wait for those threads
    dist.GroupMember.WORLD = None
    c10d._world.pg_map.clear()
    c10d._world.pg_names.clear()
    c10d._world.pg_group_ranks.clear()
    c10d._world.pg_backend_config.clear()
    c10d._world.group_count = 0
    c10d._unregister_all_process_groups()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


kept: list[Any] = []


def wait(child: int, reader: int, kill_after: float | None, seconds: float = 60.0) -> int:
    """The child's end: its exit code, or minus the signal's number.

    `kill_after`: seconds after it has joined the others, SIGKILL.
    """
    joined = os.read(reader, 1)
    os.close(reader)
    if joined and kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError("a child of a rank did not end")
        time.sleep(0.002)
