"""Texts out of local files: txt, jsonl and parquet, the first two also as .gz or .zst.

A txt file is one document; jsonl and parquet hold one in the text field of each row.
"""

import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparse_gpt.data.decompression import Watched, zstd
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import parse

_PIECE = 1 << 20
EXTENSIONS = (".txt", ".jsonl", ".parquet", ".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst")


def find(paths: Sequence[Path]) -> list[Path]:
    """Files to read: those named, and those of the known kinds inside named folders.

    Folders are searched recursively in sorted order; hidden files and other kinds are left out.
    Raises UserError for a missing path, an unknown kind named as such, and a folder without any.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                (
                    p
                    for p in path.rglob("*")
                    if p.name.endswith(EXTENSIONS)
                    and p.is_file()
                    and not any(part.startswith(".") for part in p.relative_to(path).parts)
                ),
                key=lambda p: p.relative_to(path).as_posix(),
            )
            if not inside:
                raise UserError(f"--input {path} holds no {', '.join(EXTENSIONS)} file")
            found += inside
        elif not path.exists():
            raise UserError(f"--input {path} does not exist")
        elif not path.name.endswith(EXTENSIONS):
            raise UserError(f"--input {path}: known kinds are {', '.join(EXTENSIONS)}")
        else:
            found.append(path)
    return found


def read_texts(
    path: Path, *, text_field: str, encoding: str, lines: bool, limit: int
) -> Iterator[str]:
    """Texts of one file. lines: a txt file gives its lines instead of one document.

    limit: largest document in bytes. Line ends are kept as they are; a byte-order mark is not.
    Raises UserError naming the file and the line or row at fault.
    """
    if path.name.endswith(".parquet"):
        yield from _parquet(path, text_field, limit)
        return
    with _opened(path) as file:
        if ".jsonl" in path.suffixes[-2:]:
            yield from _jsonl(path, file, text_field, limit)
        elif lines:
            for number, line in enumerate(_long_lines(path, file, limit), start=1):
                yield _decode(line, encoding, f"{path} line {number}")
        else:
            content = bytearray()  # a read of `limit` bytes would take them at once
            while piece := file.read(_PIECE):
                content += piece
                if len(content) > limit:
                    raise UserError(f"{path} is a document of more than {limit:,} bytes; split it")
            yield _decode(content, encoding, str(path))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; damage in the compressed stream becomes a UserError."""
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                yield io.BufferedReader(Watched(path, raw, file), _PIECE)
        elif path.suffix == ".zst":
            yield io.BufferedReader(Watched(path, raw, zstd(raw)), _PIECE)
        else:
            yield raw


def _decode(content: bytes | bytearray, encoding: str, where: str) -> str:
    try:
        text = content.decode(encoding)
    except LookupError as error:
        raise UserError(f"--encoding {encoding!r} is not known to Python") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} is not {encoding}; convert it or set --encoding"
        ) from error
    return text.removeprefix("\ufeff")


def _long_lines(path: Path, file: BinaryIO, limit: int) -> Iterator[bytes]:
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise UserError(f"{path} has a line of more than {limit:,} bytes; split it")
        yield line


def _jsonl(path: Path, file: BinaryIO, text_field: str, limit: int) -> Iterator[str]:
    for number, line in enumerate(_long_lines(path, file, limit), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = parse(line.removeprefix(b"\xef\xbb\xbf"), unique=False)
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON ({error})") from error
        yield text_of(row, text_field, where, limit)


def _parquet(path: Path, text_field: str, limit: int) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{path} has no column {text_field!r}; it has: {', '.join(names)}; set "
                    "--text-field"
                )
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=[text_field]):
                for value in batch.column(0):
                    row = {text_field: value.as_py()}
                    yield text_of(row, text_field, f"{path} row {number}", limit)
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file: {str(error)[:500]}") from error


def text_of(row: Any, text_field: str, where: str, limit: int) -> str:
    """The text field of a row.

    UserError where it is missing, not a string, not Unicode, or of more than `limit` bytes.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with a {text_field!r} field")
    if text_field not in row:
        known = ", ".join(str(key) for key in row)[:500]
        raise UserError(f"{where} has no field {text_field!r}; it has: {known}; set --text-field")
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is {type(text).__name__}, not a string")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {text_field!r} has a lone surrogate at character {error.start}, "
            "which is not text"
        ) from error
    if size > limit:
        raise UserError(f"{where} is a document of more than {limit:,} bytes; split it")
    return text
