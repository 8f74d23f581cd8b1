"""Checks on the test session as a whole: no network, no process and no shared memory left."""

import os
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = Path("/dev/shm")
# In the environment of every process a test starts, however far down and wherever reparented.
MARK = "SPARSE_GPT_TEST_SESSION"


def marked_processes(variable: str, value: str) -> list[psutil.Process]:
    """The processes, other than this one, started with that environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(variable) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or not ours to look into
    return found


def refuse_network() -> None:
    """Make a connection from this process to any other machine an error."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host = str(arguments[1][0])
            if not (host.startswith("127.") or host in ("::1", "localhost", "0.0.0.0")):
                raise RuntimeError(f"tests use no network; this one connects to {host}")

    sys.addaudithook(hook)


class Leftovers:
    """Made at the session's start; `end` looks for what outlived it and ends that.

    `found`: one line for each process still alive and each file of /dev/shm that nobody uses.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._session = uuid.uuid4().hex
        os.environ[MARK] = self._session
        self._before = _shared_memory()

    def end(self) -> list[str]:
        processes = marked_processes(MARK, self._session)
        psutil.wait_procs(processes, timeout=5)  # some are on their way out
        for process in processes:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                self.found.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
                process.kill()
        new = _shared_memory() - self._before
        # Another program's new file is one that some process has open or mapped.
        in_use = _open_files() if new else set()
        self.found += [f"shared memory {name}" for name in sorted(new - in_use)]
        return self.found


def _shared_memory() -> set[str]:
    if not SHARED_MEMORY.is_dir():
        return set()
    own = os.getuid()
    names = set()
    for path in SHARED_MEMORY.iterdir():
        try:
            if path.stat().st_uid == own:
                names.add(str(path))
        except FileNotFoundError:
            continue  # another program's, gone meanwhile
    return names


def _open_files() -> set[str]:
    """Files of /dev/shm that a living process has open or mapped."""
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used |= {os.readlink(fd) for fd in (process / "fd").iterdir()}
            lines = (process / "maps").read_text().splitlines()
        except OSError:
            continue  # gone meanwhile, or not ours to look into
        used |= {line.split(maxsplit=5)[5] for line in lines if str(SHARED_MEMORY) in line}
    return {name for name in used if name.startswith(str(SHARED_MEMORY))}
