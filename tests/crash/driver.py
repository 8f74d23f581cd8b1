"""Pretraining that ends itself by SIGKILL at a chosen place of a save.

    deepspeed tests/crash/driver.py CONFIG

CRASH_AT=tensors:7 ends each rank before its 7th file; CRASH_AT=publish:2 ends rank 0 once the
2nd manifest is written, before the checkpoint gets its final name.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sparse_gpt.errors import run_main


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def counted(inner: Callable[..., Any], last: int, after: bool) -> Callable[..., Any]:
    """`inner`, fatal at its call number `last`: before it runs, or after."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last and not after:
            die()
        result = inner(*args, **kwargs)
        if calls == last and after:
            die()
        return result

    return call


def arm(place: str, number: int) -> None:
    from sparse_gpt.train import checkpoint, checkpoint_files

    if place == "tensors":
        checkpoint_files.write_tensors = counted(checkpoint_files.write_tensors, number, False)
    elif place == "publish":
        checkpoint.write_manifest = counted(checkpoint.write_manifest, number, True)
    else:
        raise ValueError(f"CRASH_AT names no place of a save: {place}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    place, number = os.environ["CRASH_AT"].split(":")
    arm(place, int(number))

    from sparse_gpt.train.pretrain import pretrain

    pretrain(args.config)
    return 0


if __name__ == "__main__":
    run_main(main)
