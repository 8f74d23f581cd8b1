"""Numbers of a file, read where they are asked for, by a descriptor that stays open.

Not a memory map: a file that shrinks, or a page that its disk or network mount cannot give, would
end the process with SIGBUS and not a word. Here both are a `UserError` that names the file, the
second a `TryAgain`.
"""

import copy
import errno
import os
import resource
import stat
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparse_gpt.errors import TryAgain, UserError

_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
# Open at once, over all files of this process; the rest of its descriptors is for others.
MOST_OPEN = _limit // 4 if _limit > 0 else 1 << 16
# The user's, where they are met at first; later they are the disk's or mount's, as all others are.
_FINAL = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM}
_NEVER = (-1, -1)  # size and time of change of a file that was not opened yet


class Numbers(Protocol):
    """What can be sliced into arrays of one dimension: a `NumberFile`, or an array."""

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


class _Descriptor:
    """Closed with its last reference: never under a thread that reads."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


class NumberFile:
    """`count` numbers of `dtype` from byte `offset` on; a slice (without a step) reads them.

    Open from the start, so that a file whose name is given to another goes on as it was. Of more
    than `MOST_OPEN` the ones longest open are closed, and opened again when they are read, as
    are those that were pickled; then a file of another size or time of change is refused.
    Reads have no position: threads and forked processes may share it.
    """

    def __init__(self, path: Path, dtype: Any, offset: int = 0, count: int | None = None):
        self.path, self.dtype, self._offset = path, np.dtype(dtype), offset
        self._stamp = _NEVER
        self._held: _Descriptor | None = None
        self._open()
        rest = self._stamp[0] - offset
        self._count = rest // self.dtype.itemsize if count is None else count

    def __len__(self) -> int:
        return self._count

    def part(self, dtype: Any, offset: int, count: int) -> "NumberFile":
        """Other numbers of the file as it was opened; the offset is in bytes, from its start."""
        made = copy.copy(self)
        made.dtype, made._offset, made._count = np.dtype(dtype), offset, count
        made._held = self._held
        return made

    def __getitem__(self, where: slice, /) -> np.ndarray:
        start, stop, _ = where.indices(self._count)
        out = np.empty(max(0, stop - start), self.dtype)
        rest, at = out.view(np.uint8).data, self._offset + start * self.dtype.itemsize
        held, stale = self._held or self._open(), False
        while rest:
            try:
                got = os.preadv(held.number, [rest], at)
            except OSError as error:
                if error.errno == errno.ESTALE and not stale:
                    held, stale = self._open(), True  # a network mount's server may be back
                    continue
                raise self._unreadable(error) from error
            if got == 0:
                raise UserError(
                    f"{self.path} was cut short while it was in use: bytes up to {at + len(rest)} "
                    f"are needed, it ends at {at} or before; put it back, then start again"
                )
            rest, at = rest[got:], at + got
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": None}

    def _open(self) -> _Descriptor:
        try:
            held = _Descriptor(os.open(self.path, os.O_RDONLY))
            state = os.fstat(held.number)
            if stat.S_ISDIR(state.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise self._unreadable(error) from error
        stamp = state.st_size, state.st_mtime_ns
        if self._stamp not in (_NEVER, stamp):
            raise UserError(
                f"{self.path} is not the file that was opened at first (its size or time of change "
                "differs); start again with data that nobody changes"
            )
        self._stamp, self._held = stamp, held
        # The oldest goes, not the least used: of a shuffled order both are right as often, and
        # this needs no lock (two threads at once may only close one too many).
        _opened.append(weakref.ref(self))
        while len(_opened) > MOST_OPEN:
            if (oldest := _opened.popleft()()) is not None:
                oldest._held = None
        return held

    def _unreadable(self, error: OSError) -> UserError:
        final = self._stamp == _NEVER and error.errno in _FINAL
        return (UserError if final else TryAgain)(
            f"{self.path} cannot be read: {error.strerror or error}; make sure that it is there "
            "and its disk or network mount is whole, then start again"
        )


_opened: deque[weakref.ref[NumberFile]] = deque()
