"""Every operation of this process on files below a folder, seen before it happens.

    def before(operation):
        if operation.number == 7:
            operation.tear()
            os.kill(os.getpid(), signal.SIGKILL)

    with watched(folder, before):
        checkpointer.save(...)

`os`, `open` and the writer of safetensors are replaced while the block runs. A tensor file is
written by a library at once, as `create` and `write`.
"""

import builtins
import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sparse_gpt.train import checkpoint_files, checkpoint_folder

WRITING = ("create", "write", "mkdir", "fsync")  # a full disk can refuse these


@dataclass(frozen=True)
class Operation:
    """One operation, about to happen. Paths are relative to the watched folder."""

    number: int  # from 1
    kind: str  # create, write, fsync, rename, exchange, mkdir, unlink, rmdir
    path: str
    target: str = ""  # the new name, of rename and exchange
    tear: Callable[[], None] = lambda: None  # do half of it: half a write


Before = Callable[[Operation], None]
After = Callable[[Operation], None]


class _Watch:
    def __init__(self, folder: Path, before: Before, after: After | None):
        self.folder, self.before, self.after = Path(os.path.realpath(folder)), before, after
        self.number = 0

    def relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the folder, or None where it is elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
        head, name = os.path.split(os.path.abspath(os.fspath(path)))
        whole = Path(os.path.realpath(head)) / name
        return str(whole.relative_to(self.folder)) if whole.is_relative_to(self.folder) else None

    def run(
        self,
        kind: str,
        path: str | None,
        action: Callable[[], Any],
        target: str = "",
        tear: Callable[[], None] = lambda: None,
    ) -> Any:
        if path is None:
            return action()
        self.number += 1
        operation = Operation(self.number, kind, path, target, tear)
        self.before(operation)
        result = action()
        if self.after is not None:
            self.after(operation)
        return result


class _File:
    """A file open for writing, whose writes are operations."""

    def __init__(self, watch: _Watch, file: Any, path: str):
        self._watch, self._file, self._path = watch, file, path

    def write(self, data: Any) -> int:
        def tear() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._watch.run("write", self._path, lambda: self._file.write(data), tear=tear)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _open(watch: _Watch, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = watch.relative(file) if set(mode) & set("wxa+") else None
        if path is None:
            return inner(file, mode, *args, **kwargs)
        opened = watch.run("create", path, lambda: inner(file, mode, *args, **kwargs))
        return _File(watch, opened, path)

    return call


def _one(watch: _Watch, kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
        more = kwargs if dir_fd is None else kwargs | {"dir_fd": dir_fd}
        return watch.run(kind, watch.relative(path, dir_fd), lambda: inner(path, *args, **more))

    return call


def _two(watch: _Watch, kind: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        new = watch.relative(target) or ""
        return watch.run(
            kind, watch.relative(source), lambda: inner(source, target, *args, **kwargs), new
        )

    return call


def _save_file(watch: _Watch, inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        path = watch.relative(filename)
        if path is None:
            return inner(tensors, filename, *args, **kwargs)

        def tear() -> None:
            inner(tensors, filename, *args, **kwargs)
            os.truncate(filename, os.path.getsize(filename) // 2)

        watch.run("create", path, lambda: _create(filename))
        return watch.run(
            "write", path, lambda: inner(tensors, filename, *args, **kwargs), tear=tear
        )

    return call


def _create(path: Any) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))


@contextmanager
def watched(folder: Path, before: Before, after: After | None = None) -> Iterator[None]:
    """Call `before` ahead of every operation below `folder`, and `after` behind it."""
    watch = _Watch(folder, before, after)
    opening = _open(watch, io.open)
    places: list[tuple[Any, str, Any]] = [
        (builtins, "open", opening),
        (io, "open", opening),
        (os, "fsync", _one(watch, "fsync", os.fsync)),
        (os, "mkdir", _one(watch, "mkdir", os.mkdir)),
        (os, "unlink", _one(watch, "unlink", os.unlink)),
        (os, "remove", _one(watch, "unlink", os.remove)),
        (os, "rmdir", _one(watch, "rmdir", os.rmdir)),
        (os, "rename", _two(watch, "rename", os.rename)),
        (os, "replace", _two(watch, "rename", os.replace)),
        (checkpoint_folder, "exchange", _two(watch, "exchange", checkpoint_folder.exchange)),
        (checkpoint_files, "save_file", _save_file(watch, checkpoint_files.save_file)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in places:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def copy_tree(source: Path, target: Path) -> None:
    """A copy in the place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
