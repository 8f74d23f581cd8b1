"""Pretraining or fine-tuning in which chosen ranks meet a fault at a chosen place.

    FAULT=PLACE:NUMBER:RANKS:WHAT deepspeed tests/crash/faulty.py CONFIG

PLACE   meet (before the ranks have met), start (before the Trainer), engine (before its start),
        step, validate, update (a topology update), save
NUMBER  which time that place is come to, from 1
RANKS   0,1 or all
WHAT    pause (1.5 s, for the test to send a signal), exit (9), kill, raise, refuse (raise a
        UserError), hang, freeze (SIGSTOP)
FINETUNE=1 fine-tunes.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_gpt.errors import UserError, run_main
from sparse_gpt.train.signals import listen

PAUSE_SECONDS = 1.5


def meet(what: str, place: str) -> None:
    print(f"FAULT {what} in {place} of rank {os.environ['RANK']}", flush=True)
    if what == "pause":
        time.sleep(PAUSE_SECONDS)
    elif what == "exit":
        os._exit(9)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise RuntimeError("an injected fault")
    elif what == "refuse":
        raise UserError("an injected error")
    elif what == "hang":
        while True:
            time.sleep(3600)
    else:
        raise ValueError(f"FAULT names no fault: {what}")


def at_call(inner: Callable[..., Any], number: int, action: Callable[[], None]) -> Any:
    """`inner`, with `action` before its call of that number."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return inner(*args, **kwargs)

    return call


def arm(place: str, number: int, what: str) -> None:
    from sparse_gpt.topology.controller import TopologyController
    from sparse_gpt.train import assemble, loop, pretrain
    from sparse_gpt.train.checkpoint import Checkpointer

    owner, name = {
        "meet": (pretrain, "init_ranks"),
        "start": (loop.Trainer, "__init__"),
        "engine": (assemble, "start_engine"),
        "step": (loop.Trainer, "_step"),
        "validate": (loop, "evaluate"),
        "update": (TopologyController, "_update"),
        "save": (Checkpointer, "_write"),
    }[place]
    setattr(owner, name, at_call(getattr(owner, name), number, lambda: meet(what, place)))


def main() -> int:
    listen()
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    if fault := os.environ.get("FAULT"):
        place, number, ranks, what = fault.split(":")
        if ranks == "all" or os.environ["RANK"] in ranks.split(","):
            arm(place, int(number), what)
    if os.environ.get("FINETUNE"):
        from sparse_gpt.finetune.spdf import finetune

        finetune(args.config)
        return 0
    from sparse_gpt.train.pretrain import pretrain

    pretrain(args.config)
    return 0


if __name__ == "__main__":
    run_main(main)
