"""A process whose triton interprets kernels, for tests.

`TRITON_INTERPRET` counts when triton is imported, so the interpreter has a process of its own, and
other tests see nothing of it. Functions of test modules and their arguments go there and results
come back, pickled.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Interpreter:
    def __init__(self) -> None:
        environment = os.environ | {
            "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ops.interpreter"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump((function, arguments), self.process.stdin)
        self.process.stdin.flush()
        fine, result = pickle.load(self.process.stdout)  # noqa: S301 - our own process
        if not fine:
            raise AssertionError(f"in the interpreter's process:\n{result}")
        return result

    def close(self) -> None:
        self.process.communicate()  # closes its input, which ends it


def _serve() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no result
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 - our own process
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, results)
        results.flush()


if __name__ == "__main__":
    _serve()
