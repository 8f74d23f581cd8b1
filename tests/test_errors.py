"""The way out of an entry point."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_gpt.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]
# What threads of an exchange do at the interpreter's end: they abort the process.
SCRIPT = """
import atexit, os, sys
import torch.distributed as dist
from sparse_gpt.errors import InUse, Stopped, UserError, run_main
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
atexit.register(os.abort)
def main():
    print("said before", end="")
    raise {error}
run_main(main)
"""


def test_an_error_is_one_write(monkeypatch):
    """Two ranks say theirs at once, unbuffered, and no line is of both."""
    pieces = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))

    def main():
        raise UserError("bad key")

    with pytest.raises(SystemExit):
        run_main(main)
    assert [piece for piece in pieces if piece] == ["error: bad key\n"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("UserError('bad key')", 2, "error: bad key\n"),
        ("Stopped('asked')", 75, ""),
        ("Stopped('asked', 76)", 76, ""),
        ("RuntimeError('a fault')", 1, "RuntimeError: a fault\n"),
        ("InUse('taken')", 1, "error: taken\n"),
    ],
)
def test_the_exit_code_stays_while_ranks_are_joined(error, code, said):
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stderr
    assert (ended.stdout, ended.stderr.endswith(said)) == ("said before", True)
