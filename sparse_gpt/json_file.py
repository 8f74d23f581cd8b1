"""JSON from files that may come from anywhere: of bounded size, and with one meaning.

What is wrong with a file is an `OSError` or a `ValueError`, never anything else: each reader adds
what the file is for and what to do. Nesting too deep for the parser, integers of thousands of
digits and keys given twice (of which programs take the first or the last) are such errors.
"""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST = 16 << 20  # bytes; the manifest of thousands of ranks has some
LONGEST_LINE = 1 << 20  # bytes, of a log: it has names, and numbers of ranks


def read_bytes(path: Path | str, most: int = LARGEST) -> bytes:
    """All of a regular file of at most `most` bytes; no more than that is ever read."""
    path = Path(path)
    status = _regular(path)
    if status.st_size > most:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {most:,} it may have")
    with open(path, "rb") as file:
        content = file.read(status.st_size + 1)
    if len(content) > status.st_size:
        raise ValueError("it grows while it is read")
    return content


def read_json(path: Path | str, most: int = LARGEST, *, unique: bool = True) -> Any:
    """The value in a file. `unique=False` takes the last of equal keys, in files of others."""
    return parse(read_bytes(path, most), unique=unique)


def read_object(path: Path | str, most: int = LARGEST, *, unique: bool = True) -> dict[str, Any]:
    """The object in a file; `ValueError` for any other value."""
    value = read_json(path, most, unique=unique)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {_kind(value)}, not a JSON object")
    return value


def read_lines(path: Path | str, most: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a regular file, without their ends: one at a time is in memory.

    Of one longer than `most` bytes come the first `most + 1`.
    """
    path = Path(path)
    _regular(path)
    with open(path, "rb") as file:
        while line := file.readline(most + 1):
            yield line.removesuffix(b"\n")
            while len(line) > most and not line.endswith(b"\n"):
                line = file.readline(most + 1)


def read_objects(path: Path | str, most: int = LONGEST_LINE) -> Iterator[dict[str, Any]]:
    """The objects of a log, one a line; `ValueError` for any other line, or a longer one."""
    for number, line in enumerate(read_lines(path, most), 1):
        if len(line) > most:
            raise ValueError(f"line {number:,} has more than the {most:,} bytes it may have")
        try:
            yield parse_object(line)
        except ValueError as error:
            raise ValueError(f"line {number:,}: {error}") from None


def parse(text: str | bytes, *, unique: bool = True) -> Any:
    """`json.loads` of UTF-8, whose errors are all `ValueError`."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """`parse` of an object; `ValueError` for any other value."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"{_kind(value)}, not a JSON object")
    return value


def _regular(path: Path) -> os.stat_result:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    return status


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:80]!r} is given twice")
            seen.add(key)
    return tree


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
