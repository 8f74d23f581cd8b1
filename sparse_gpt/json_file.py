"""JSON from files that may come from anywhere: of bounded size, and with one meaning.

What is wrong with a file is an `OSError` or a `ValueError`, never anything else: each reader adds
what the file is for and what to do. Nesting too deep for the parser, integers of thousands of
digits and keys given twice (of which programs take the first or the last) are such errors.
"""

import json
import stat
from pathlib import Path
from typing import Any

LARGEST = 16 << 20  # bytes; the manifest of thousands of ranks has some


def read_bytes(path: Path | str, most: int = LARGEST) -> bytes:
    """All of a regular file of at most `most` bytes; no more than that is ever read."""
    path = Path(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
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
