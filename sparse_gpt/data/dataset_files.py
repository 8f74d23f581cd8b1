"""Files of a data set as `datasets` opens them, with the bounds of `--input` on what they hold."""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import count
from typing import Any

from sparse_gpt.data.decompression import Watched, xz, zstd
from sparse_gpt.errors import UserError

_OWN: dict[str, Callable[[Any], Any]] = {"xz": xz, "zstd": zstd}


@contextmanager
def watched(longest_line: int) -> Iterator[None]:
    """A block in which `datasets` opens files and reads rows; outside it nothing is changed.

    A file that it opens stays watched. Reading one raises UserError that names it for an absurd
    expansion, a line of more than `longest_line` bytes, damage, a zip's rare methods and where it
    is compressed twice. What a network fails to give is asked for again, as often as `datasets`
    would, but where nothing is lost by it.
    """
    begin, end = _hooks(longest_line)
    try:
        begin()
        yield
    finally:
        end()


def rows(split: Iterable[Any], where: str, longest_line: int) -> Iterator[tuple[str, Any]]:
    """Name and content of each row; files are watched while one is read, not between rows.

    Raises UserError naming the row, or the file, for what cannot be read.
    """
    reader = iter(split)
    begin, end = _hooks(longest_line)
    for number in count():
        try:
            begin()
            row = next(reader)
        except StopIteration:
            return
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # the libraries raise many types
            raise UserError(f"{where} row {number} cannot be read: {first_line(error)}") from error
        finally:
            end()
        yield f"{where} row {number}", row


def first_line(error: Exception) -> str:
    """What a library says, as far as it goes into a message."""
    return str(error).strip().split("\n")[0][:500] or type(error).__name__


def _hooks(longest_line: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """What begins to watch, and what ends it; made once, as they are called for every row."""
    from datasets.utils import file_utils
    from fsspec.compression import compr
    from fsspec.registry import get_filesystem_class, register_implementation

    def put(openers: dict[Any, Any], archive: Any, inferred: Any) -> None:
        compr.update(openers)
        register_implementation("zip", archive, clobber=True)
        file_utils._get_extraction_protocol = inferred

    openers, archive = compr.copy(), get_filesystem_class("zip")
    inferred = file_utils._get_extraction_protocol
    watching = {name: _opener(name, openers[name], longest_line) for name in openers if name}
    begin = partial(put, watching, _watched_zip(archive, longest_line), _once(inferred))
    return begin, partial(put, openers, archive, inferred)


def _asked_again(raw: Any) -> Any:
    """`raw`, whose reads `datasets` repeats where its connection fails.

    It does so itself, but of what is decompressed: there a repeated read goes on behind the bytes
    that buffers lost with the failed one.
    """
    from datasets.utils import file_utils

    return file_utils._add_retries_to_file_obj_read_method(raw)


@cache
def _opener(name: str, opener: Any, longest_line: int) -> Any:
    """What fsspec opens a compressed file with: `opener`, watched."""

    def opened(raw: Any, mode: str = "rb", **options: Any) -> Any:
        if "r" not in mode:
            return opener(raw, mode=mode, **options)
        raw = _asked_again(raw)
        file = _OWN[name](raw) if name in _OWN else opener(raw, mode=mode, **options)
        where = getattr(raw, "name", None) or getattr(raw, "path", "a compressed file")
        return io.BufferedReader(Watched(where, raw, file, longest_line, (file, raw)))

    return opened


@cache
def _watched_zip(archive: Any, longest_line: int) -> Any:
    class WatchedZip(archive):
        """Members of a zip, watched: what its directory says of their sizes may be a lie."""

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            if self.mode == "r":
                self.fo = self.zip.fp = _asked_again(self.fo)

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            file = super()._open(path, mode=mode, **options)
            if "r" not in mode:
                return file
            where = f"{path} in {getattr(self.fo, 'name', 'a zip')}"
            method = self.zip.getinfo(self._strip_protocol(path)).compress_type
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile decompresses these in pieces without a bound
                raise UserError(f"{where} is neither stored nor deflated; unpack it")
            return io.BufferedReader(Watched(where, self.fo, file, longest_line, (file,)))

    return WatchedZip


def _once(inferred: Any) -> Any:
    """pandas would decompress what comes out of a compressed file, unwatched."""

    def protocol(urlpath: Any, *args: Any, **options: Any) -> str | None:
        found = inferred(urlpath, *args, **options)
        if found is not None and "::" in str(urlpath):
            raise UserError(f"{urlpath} is compressed twice; decompress it once")
        return found

    return protocol
