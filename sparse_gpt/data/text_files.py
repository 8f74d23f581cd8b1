"""Texts out of local files: txt, jsonl and parquet, the first two also as .gz or .zst.

A txt file is one document; jsonl and parquet hold one in the text field of each row.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import parse

# No text expands like this: gzip's most is 1,032-fold, of zeros, and a text's usual 3- to 10-fold.
MAX_EXPANSION = 200
_PIECE = 1 << 20
FREE_BYTES = 1 << 26  # decompressed before the expansion is looked at
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


class _Watched(io.RawIOBase):
    """Decompressed bytes, as long as they are not absurdly many for the compressed ones read."""

    def __init__(self, path: Path, raw: BinaryIO, decompressed: Any):
        self._path, self._raw, self._source, self._given = path, raw, decompressed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        n = self._source.readinto(buffer)
        self._given += n
        if self._given > FREE_BYTES and self._given > MAX_EXPANSION * self._raw.tell():
            raise UserError(
                f"{self._path} expands more than {MAX_EXPANSION}-fold, which no text does; if it "
                "is one, decompress it first"
            )
        return n


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a file of zstd frames; EOFError where the last one is cut short.

    (The library's own stream reader ends there as if the file were whole.)
    """

    # Small, because one byte can expand to 32 KiB: bounds the memory a hostile file can take.
    _CHUNK = 1024

    def __init__(self, raw: BinaryIO):
        self._raw, self._frame, self._ready = raw, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            chunk = self._raw.read(self._CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _decompress(self, chunk: bytes) -> bytes:
        import zstandard

        out = []
        while chunk:
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            out.append(self._frame.decompress(chunk))
            chunk = b""
            if self._frame.eof:
                chunk, self._frame = self._frame.unused_data, None
        return b"".join(out)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; damage in the compressed stream becomes a UserError."""
    import zstandard

    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=raw, mode="rb") as file:
                    yield io.BufferedReader(_Watched(path, raw, file), 1 << 20)  # pyright: ignore[reportReturnType]
            elif path.suffix == ".zst":
                watched = _Watched(path, raw, _ZstdReader(raw))
                yield io.BufferedReader(watched, 1 << 20)  # pyright: ignore[reportReturnType]
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


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
