"""Pretraining in which one operation on a file of a save is fatal, or refused.

    SAVE_FAULT=FILE deepspeed tests/faults/driver.py CONFIG

Each save looks for FILE first. It holds WHAT:RANK:OPERATION[:SAVE], and is removed when that is
met, in the first save that has as many operations:

WHAT       kill (SIGKILL; every second one in the middle of the operation), hang, full, read-only
           or gone (the folder of the checkpoints is moved away)
RANK       the one that meets it
OPERATION  which operation on files of a save, from 1; `refusals.CERTAIN` are in each
SAVE       which save of this start, from 1; any where it is left out
"""

import argparse
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_gpt.errors import run_main
from sparse_gpt.train.signals import listen

listen()  # before the slow imports

from tests.faults.operations import Operation, watched  # noqa: E402
from tests.faults.refusals import refusal  # noqa: E402


def arm(place: Path) -> None:
    """Make the saves of this process look there."""
    from sparse_gpt.train.checkpoint import Checkpointer

    inner, saves = Checkpointer.save, 0

    def armed(self: Checkpointer, *args: Any, **kwargs: Any) -> Path:
        nonlocal saves
        saves += 1
        fault = read(place, saves)
        if fault is None:
            return inner(self, *args, **kwargs)
        with watched(self.folder, partial(meet, *fault, self.folder, place)):
            return inner(self, *args, **kwargs)

    Checkpointer.save = armed


def read(place: Path, save: int) -> tuple[str, int] | None:
    """What this rank is to meet in this save of its start, and at which operation."""
    try:
        what, rank, operation, *which = place.read_text().split(":")
    except FileNotFoundError:
        return None
    mine = rank == os.environ["RANK"] and (not which or int(which[0]) == save)
    return (what, int(operation)) if mine else None


def meet(what: str, number: int, folder: Path, place: Path, operation: Operation) -> None:
    if operation.number != number:
        return
    place.unlink()
    print(f"FAULT {what} in {operation.kind} {operation.path}", flush=True)
    if what == "gone":
        os.rename(folder, folder.with_name("away"))
        return
    while what == "hang":
        time.sleep(3600)
    if operation.number % 2:
        operation.tear()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise refusal(what, folder / operation.path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    if fault := os.environ.get("SAVE_FAULT"):
        arm(Path(fault))
    from sparse_gpt.train.pretrain import pretrain

    pretrain(args.config)
    return 0


if __name__ == "__main__":
    run_main(main)
