"""Pretraining in which one operation on a file of a save is fatal, or refused.

    SAVE_FAULT=WHAT:RANK:SAVE:OPERATION deepspeed tests/faults/driver.py CONFIG

WHAT       kill (SIGKILL; every second one in the middle of the operation), full, read-only or
           gone (the folder of the checkpoints is moved away)
RANK       the one that meets it, or all
SAVE       which save of this start, from 1
OPERATION  which of its operations on files, from 1
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_gpt.errors import run_main
from sparse_gpt.train.signals import listen


def arm(fault: str) -> None:
    """Make the saves of this process meet it."""
    from sparse_gpt.train.checkpoint import Checkpointer
    from tests.faults.operations import Operation, watched
    from tests.faults.refusals import refusal

    what, rank, save, number = fault.split(":")
    if rank not in ("all", os.environ["RANK"]):
        return
    inner, saves = Checkpointer.save, 0

    def meet(operation: Operation, folder: Path) -> None:
        if operation.number != int(number):
            return
        print(f"FAULT {what} in {operation.kind} {operation.path}", flush=True)
        if what == "gone":
            os.rename(folder, folder.with_name("away"))
            return
        if operation.number % 2:
            operation.tear()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise refusal(what, folder / operation.path)

    def armed(self: Checkpointer, *args: Any, **kwargs: Any) -> Path:
        nonlocal saves
        saves += 1
        if saves != int(save):
            return inner(self, *args, **kwargs)
        with watched(self.folder, lambda operation: meet(operation, self.folder)):
            return inner(self, *args, **kwargs)

    Checkpointer.save = armed


def main() -> int:
    listen()
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    if fault := os.environ.get("SAVE_FAULT"):
        arm(fault)
    from sparse_gpt.train.pretrain import pretrain

    pretrain(args.config)
    return 0


if __name__ == "__main__":
    run_main(main)
