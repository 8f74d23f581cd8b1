"""The real `deepspeed` command in tests: run it to its end, or start it and kill what it started.

Always on the CPU, offline, with a free master port. Mark such tests `@pytest.mark.launcher`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

import psutil

from tests.leftovers import marked_processes
from tests.ranks import ROOT, cpu_environment, free_port

T = TypeVar("T")

BIN = Path(sys.executable).parent  # not resolved: the virtual environment's, not the system's
# In the environment of the launcher and of all it starts, so that they are found when orphaned.
MARK = "SPARSE_GPT_LAUNCH"


class Launch:
    """A running `deepspeed` command; leaving its `with` block kills what is left of it.

    `output` is what the command has printed so far, stdout and stderr as they came.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str] | None, cwd: Path | None):
        self.arguments = list(arguments)
        self._mark = uuid.uuid4().hex
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - by __exit__
        environment = os.environ | cpu_environment() | {MARK: self._mark, **(env or {})}
        if env is None or "PATH" not in env:
            environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
        self.process = subprocess.Popen(
            self.arguments,
            env=environment,
            cwd=cwd or ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches pytest alone, which then kills the rest
        )

    @property
    def output(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything of this command that is alive, orphans included."""
        return marked_processes(MARK, self._mark)

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes alive now, by rank; not the children they have."""
        ranks: dict[int, tuple[psutil.Process, int, str]] = {}  # by process id
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank := process.environ().get("RANK"):
                    ranks[process.pid] = (process, process.ppid(), rank)
        found = {
            int(rank): process for process, parent, rank in ranks.values() if parent not in ranks
        }
        return dict(sorted(found.items()))

    def wait_for_ranks(self, count: int, timeout: float = 60.0) -> dict[int, psutil.Process]:
        """`ranks()` once `count` of them run; RuntimeError with the output otherwise."""
        return self._wait_for(
            lambda: ranks if len(ranks := self.ranks()) >= count else None,
            f"{count} ranks",
            timeout,
        )

    def wait_for_output(self, text: str, timeout: float = 120.0) -> str:
        """The output once it holds `text`; RuntimeError with the output otherwise."""
        return self._wait_for(
            lambda: output if text in (output := self.output) else None,
            f"{text!r} in the output",
            timeout,
        )

    def _wait_for(self, look: Callable[[], T | None], what: str, timeout: float) -> T:
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None  # before the look: it may end right after it
            if (found := look()) is not None:
                return found
            if ended:
                raise RuntimeError(f"the command ended without {what}:\n{self.output}")
            if time.monotonic() > deadline:
                self.kill_all()
                raise RuntimeError(f"waited {timeout:g} s for {what}:\n{self.output}")
            time.sleep(0.05)

    def kill_rank(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to that rank alone."""
        self.ranks()[rank].send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL to everything of this command, until nothing is left."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)
            self.process.poll()  # reaps the launcher: psutil does not count a zombie as gone
        self.process.wait(10)

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """The command's end; everything of it is killed if that takes longer than `timeout` s.

        Raises:
            subprocess.TimeoutExpired: with the output so far.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill_all()
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.output) from error
        return subprocess.CompletedProcess(self.arguments, code, self.output, "")

    def __enter__(self) -> "Launch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill_all()
        self._log.close()


def start_deepspeed(
    script: str | Path,
    args: Sequence[object],
    ranks: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Launch:
    """Start `deepspeed --num_accelerators RANKS SCRIPT ARGS`; use it in a `with` statement.

    `script` is relative to the repository unless absolute; `env` is added to the environment.
    """
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command += [str(ROOT / script), *map(str, args)]
    return Launch(command, env, cwd)


def run_deepspeed(
    script: str | Path,
    args: Sequence[object],
    ranks: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end: exit code, and stdout and stderr together in `.stdout`.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, everything killed, with the output.
    """
    with start_deepspeed(script, args, ranks, env, cwd) as launch:
        return launch.wait(timeout)
