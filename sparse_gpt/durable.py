"""Files that are there whole or not at all, also after a power cut; and their digests."""

import ctypes
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a folder's renames and new names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """A folder and those above it, as far as they are not there; a power cut takes none of them."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_path(path.parent)


def exchange(first: Path, second: Path) -> None:
    """Each gets the other's name, both at once. `OSError` where the file system cannot do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(f"{first}: this system has no renameat2")
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first), None, str(second))


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, body: bytes) -> None:
    """Write under a temporary name, flush, rename: a reader sees the old file or the new."""
    write_pieces(path, [body])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """`write_bytes` of a file that is made piece by piece, perhaps of the old one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON; no last newline, so that a text cut short is no JSON."""
    write_text(path, json.dumps(value, indent=1))


def sha256_file(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
