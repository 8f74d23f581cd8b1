"""One runner a folder: a second one is refused as long as the first, or a run of it, lives."""

import fcntl
import json
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_object

HOLDER = "runner.json"
GRACE_SECONDS = 10.0  # for the runs of a killed runner, which the kernel is ending


class Lock:
    """Locks on folders, held by this process and by the runs that inherit `descriptors`."""

    def __init__(self, work: Path, others: Iterable[Path], grace: float = GRACE_SECONDS) -> None:
        """Raises `UserError` naming the process that holds one of the folders."""
        self.descriptors: list[int] = []
        deadline = time.monotonic() + grace
        for folder in (work, *others):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self.descriptors.append(descriptor)
            while not _locked(descriptor):
                if time.monotonic() > deadline:
                    self.release()
                    raise UserError(f"{folder}: {_holder(work)}; wait for its end, or end it")
                time.sleep(0.2)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "started": now}
        (work / HOLDER).write_text(json.dumps(holder), encoding="utf-8")

    def release(self) -> None:
        """Give the folders back; safe to call twice."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(work: Path) -> str:
    try:
        holder = read_object(work / HOLDER)
        return f"in use by process {holder['pid']}, started {holder['started']}, or by its runs"
    except (OSError, ValueError, KeyError):
        return "in use by another start of the experiment"
