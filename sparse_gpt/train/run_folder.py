"""The folder of a run: one process at a time writes there. Rank 0's."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from sparse_gpt.data.tokenizer import copy_tokenizer
from sparse_gpt.durable import make_folder, write_bytes
from sparse_gpt.json_file import read_object
from sparse_gpt.train.checkpoint_folder import id_of
from sparse_gpt.train.provenance import write_provenance

LOCK = ".lock"
CHECKPOINTS_ID = ".checkpoints-id"  # of the folder of checkpoints, which may be on another disk
WAIT_SECONDS = 120.0  # for ranks of a start before that are saving, or a dead node's lease on NFS
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


class RunFolder:
    """What is claimed stays so until `release`, or the end of the process, however that comes.

    A lock of POSIX: no process that was forked off keeps it, and network file systems know it.
    """

    def __init__(self, path: Path, wait: float = WAIT_SECONDS) -> None:
        """`wait`: seconds for another process to give the folder up."""
        self.path, self.wait = path, wait
        self._lock = None

    def claim(self) -> str:
        """Make the folder, and lock it; what to say where another run does not leave it, or ""."""
        make_folder(self.path)
        probe = self.path / ".probe"
        probe.touch()
        probe.unlink()
        deadline, said = time.monotonic() + self.wait, False
        while not self._locked():
            holder = self._holder()
            if time.monotonic() > deadline:
                self.release()
                return (
                    f"{self.path} is in use by {holder}: two runs cannot share a folder; end that "
                    "one, wait for its end, or choose another output_dir or name"
                )
            if not said:
                self._say(f"waiting for {holder}, which uses {self.path}")
                said = True
            time.sleep(0.2)
        self._sign()
        return ""

    def _sign(self) -> None:
        assert self._lock is not None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
        with contextlib.suppress(OSError):  # a full disk is named by what needs it
            self._lock.truncate(0)
            self._lock.write(json.dumps(holder).encode())

    def check(self) -> str:
        """What to say where someone removed the lock and another run has the folder, or ""."""
        if self._is_ours():
            return ""
        if self._locked():
            self._sign()
            return ""
        return (
            f"{self.path / LOCK} was removed while this run used it, and now {self._holder()} uses "
            "the folder, too; end one of them, and look at what both have written"
        )

    def _is_ours(self) -> bool:
        """Whether the file that is open has its name still."""
        try:
            there = os.stat(self.path / LOCK)
        except FileNotFoundError:
            return False
        return self._lock is not None and os.path.samestat(os.fstat(self._lock.fileno()), there)

    def _locked(self) -> bool:
        if self._lock is None or not self._is_ours():
            self.release()
            # Unbuffered: what a full disk does not take must not come up again in `release`.
            self._lock = open(self.path / LOCK, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._say(f"{self.path}: a file system without locks; see to it that one run uses it")
        return self._is_ours()  # else who had it before has removed it

    def _holder(self) -> str:
        try:
            holder = read_object(self.path / LOCK)
            return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def lost(self, checkpoints: Path) -> bool:
        """Whether a run began here whose folder of checkpoints, older than its log, has gone.

        Also where there is one, but not the one it had: a disk was mounted there.
        """
        if not (self.path / "metrics.jsonl").exists():
            return False
        had = self.path / CHECKPOINTS_ID
        return not checkpoints.is_dir() or (had.exists() and had.read_bytes() != id_of(checkpoints))

    def describe(self, config: str, tokenizer: Path | None, checkpoints: Path, anew: bool) -> None:
        """Provenance, and the tokenizer, so that an export needs nothing else.

        `config`: resolved, as YAML. `anew`: the run begins, whatever an earlier one left.
        """
        write_provenance(self.path, config)
        write_bytes(self.path / CHECKPOINTS_ID, id_of(checkpoints) or b"")
        target = self.path / "tokenizer"
        if tokenizer is not None and (anew or not target.exists()):
            temporary = target.with_name("tokenizer.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            copy_tokenizer(tokenizer, temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)

    def release(self) -> None:
        """Give the folder up; safe to call twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
