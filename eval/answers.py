"""Answers to the requests of one lm-eval task, kept on disk while they are made.

A file of answers belongs to its requests: it holds their digest, and with other requests (other
data, another tokenizer) it is left aside, with a line that says so.
"""

import hashlib
import math
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sparse_gpt.npy import read_header

SECONDS_BETWEEN_SAVES = 30.0


def digest(requests: Iterable[tuple[Sequence[int], Sequence[int]]]) -> str:
    """sha256 of the tokens of requests, (context, continuation) each, in their order."""
    sha = hashlib.sha256()
    for context, continuation in requests:
        for tokens in (context, continuation):
            values = np.asarray(tokens, dtype="<i4")
            sha.update(len(values).to_bytes(8, "little") + values.tobytes())
    return sha.hexdigest()


class Answers:
    """For each request a log-likelihood (nats, of the whole continuation) and whether every token
    of it is the model's first choice; `done` says which are there.

    path: an .npz file, read if it is there and written now and then; None keeps nothing.
    """

    def __init__(self, count: int, requests_sha256: str, path: Path | None = None) -> None:
        self.requests_sha256, self.path = requests_sha256, path
        self.done = np.zeros(count, dtype=bool)
        self.loglikelihood = np.zeros(count)
        self.greedy = np.zeros(count, dtype=bool)
        self._saved = time.monotonic()
        if path is not None and path.is_file():
            self._read(path)

    def put(self, index: int, loglikelihood: float, greedy: bool) -> None:
        self.done[index], self.loglikelihood[index] = True, loglikelihood
        self.greedy[index] = greedy

    def save(self, now: bool = False) -> None:
        """Write the file in one step, if the last time is long enough ago or `now`."""
        if self.path is None or not (now or time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES):
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                requests_sha256=np.array(self.requests_sha256),
                done=self.done,
                loglikelihood=self.loglikelihood,
                greedy=self.greedy,
            )
        temporary.replace(self.path)
        self._saved = time.monotonic()

    def as_list(self) -> list[tuple[float, bool]]:
        """The answers as lm-eval takes them; all must be there."""
        assert self.done.all()
        return [
            (float(value), bool(first)) for value, first in zip(self.loglikelihood, self.greedy)
        ]

    def _read(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as file:
                wanted = _array(file, "requests_sha256", (), "<U64")
                if str(wanted) == self.requests_sha256:
                    done = _array(file, "done", self.done.shape, "|b1")
                    values = _array(file, "loglikelihood", self.done.shape, "<f8")
                    greedy = _array(file, "greedy", self.done.shape, "|b1")
        except _BROKEN as error:
            print(f"{path} is broken ({error}): scored anew", file=sys.stderr, flush=True)
            return
        if str(wanted) != self.requests_sha256:
            print(
                f"{path}: the requests have changed (other data or tokenizer): scored anew",
                file=sys.stderr,
                flush=True,
            )
            return
        self.done, self.loglikelihood, self.greedy = done, values, greedy


_BROKEN = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError)
_BROKEN += (zipfile.BadZipFile, zlib.error)


def _array(file: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> np.ndarray:
    """An array of an .npz file, once its header is that of the answers; never a pickle.

    Read as far as that goes, whatever the file says of its size.
    """
    with file.open(f"{name}.npy") as member:
        header = read_header(member)  # pyright: ignore[reportArgumentType]
        if (header.descr, header.shape) != (descr, shape):
            raise ValueError(f"{name} is {header.descr} of {header.shape}, not {descr} of {shape}")
        size = math.prod(shape) * np.dtype(descr).itemsize
        content = member.read(size)
    if len(content) != size:
        raise ValueError(f"{name} is cut short")
    if descr == "|b1" and not set(content) <= {0, 1}:
        raise ValueError(f"{name} is neither true nor false")
    if descr.startswith("<U") and max(np.frombuffer(content, "<u4"), default=0) > 0x7F:
        raise ValueError(f"{name} is no digest")
    return np.frombuffer(content, dtype=descr).reshape(shape).copy()
