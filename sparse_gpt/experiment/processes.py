"""The processes of a run: one a rank, on cores or GPUs of their own, that end with their parent.

The kernel kills them when the process (its main thread) that started them is gone, so a killed
runner leaves nothing running. With arguments for the deepspeed command that start runs on several
nodes, the command is the one process here, and its ranks elsewhere are its own to end.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from sparse_gpt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
GRACE_SECONDS = 60.0  # between SIGTERM, at which a run saves, and SIGKILL


@dataclass(frozen=True)
class Slot:
    """What one job may use: CPU cores, and GPUs (none: it runs on the cores)."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


def slots_of(ranks: int, jobs: int | None, launcher: Sequence[str] = ()) -> list[Slot]:
    """The machine shared out among `jobs` runs of `ranks` ranks; default: as many as fit.

    Only the cores that this process may use. GPUs where torch sees some, unless DS_ACCELERATOR
    is cpu. With a `launcher` the ranks' places are its affair: one run at a time, unless `jobs`
    says more. Raises `UserError` where a run does not fit.
    """
    cores = sorted(os.sched_getaffinity(0))
    if launcher:
        return [Slot(tuple(cores))] * (jobs or 1)
    gpus = _gpus()
    if gpus:
        fitting = len(gpus) // ranks
        if not fitting or (jobs or 0) > fitting:
            raise UserError(
                f"ranks {ranks}, jobs {jobs or 1}: {len(gpus)} GPUs are not enough; lower jobs "
                "or ranks"
            )
        jobs = jobs or fitting
        return [
            Slot(tuple(cores), tuple(gpus[job * ranks : (job + 1) * ranks])) for job in range(jobs)
        ]
    jobs = jobs or max(1, len(cores) // ranks)
    if jobs >= len(cores):  # cores are shared then
        return [
            Slot((cores[job % len(cores)],) if ranks == 1 else tuple(cores)) for job in range(jobs)
        ]
    bounds = [job * len(cores) // jobs for job in range(jobs + 1)]
    return [Slot(tuple(cores[a:b])) for a, b in pairwise(bounds)]


def _gpus() -> list[str]:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return names[:count]


class Processes:
    """The ranks of one run, started; their output goes to the end of one log."""

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        ranks: int,
        slot: Slot,
        log: Path,
        keep: Sequence[int] = (),
        launcher: Sequence[str] = (),
    ) -> None:
        """`keep`: file descriptors the processes inherit. `launcher`: see the module."""
        self._file: IO[bytes] = open(log, "ab")  # noqa: SIM115 - closed in end()
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._asked = False
        command = [sys.executable, str(ROOT / script), *arguments]
        common = {"OMP_NUM_THREADS": str(max(1, len(slot.cores) // ranks))}
        if slot.gpus:
            common |= {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}
            common |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if launcher:
            deepspeed = str(Path(sys.executable).parent / "deepspeed")
            self._start([deepspeed, *launcher, *command[1:]], {}, None, keep)
            return
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        cores = None if slot.gpus else slot.cores
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._start(command, common | address | sizes | place, cores, keep)

    def _start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        cores: tuple[int, ...] | None,
        keep: Sequence[int],
    ) -> None:
        parent = os.getpid()

        def in_child() -> None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it was gone before
                os.kill(os.getpid(), signal.SIGKILL)
            if cores is not None:
                os.sched_setaffinity(0, cores)

        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=os.getcwd(),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C reaches the runner alone, which then ends the runs
            preexec_fn=in_child,
            pass_fds=tuple(keep),
        )
        self._ranks.append(process)

    def poll(self) -> int | None:
        """None while the ranks run; 0 once all have ended well, else the first bad exit code."""
        codes = [process.poll() for process in self._ranks]
        bad = [code for code in codes if code]
        if bad:
            return bad[0]
        return None if None in codes else 0

    def terminate(self) -> None:
        """Ask all ranks to end, once: a second signal would end them without saving."""
        if self._asked:
            return
        self._asked = True
        for process in self._ranks:
            if process.poll() is None:
                process.terminate()

    def end(self) -> None:
        """Wait for the ranks to end, which they were asked to; kill what has not in time."""
        self.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._ranks:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._file.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
