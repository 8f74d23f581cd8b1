"""What compressed files unfold into, as long as it could be text."""

import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

from sparse_gpt.errors import UserError

# No text expands like this: gzip's most is 1,032-fold, of zeros, and a text's usual 3- to 10-fold.
MAX_EXPANSION = 200
_PIECE = 1 << 16  # most at once: a reader may ask for a gigabyte
FREE_BYTES = 1 << 26  # decompressed before the expansion is looked at
_WINDOW = 1 << 27  # what xz may keep to refer to: twice its most; zstd has the same bound
_DAMAGE = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zstandard.ZstdError,
)


class Watched(io.RawIOBase):
    """Decompressed bytes, as long as they are not absurdly many for the compressed ones read.

    name: of the file, for messages. raw: its position tells the bytes read. longest_line: in
    bytes. closes: what this file closes with itself. Raises UserError, for damage, too; any other
    error again at every later read, for buffers have lost what was read before it.
    """

    def __init__(
        self,
        name: object,
        raw: Any,
        decompressed: Any,
        longest_line: int | None = None,
        closes: tuple[Any, ...] = (),
    ):
        self._name, self._raw, self._source = name, raw, decompressed
        self._longest, self._closes = longest_line, closes
        self._start, self._given, self._line = raw.tell(), 0, 0
        self._failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            super().close()
            for file in self._closes:
                file.close()

    def readinto(self, buffer: Any, /) -> int:
        if self._failure is not None:
            raise self._failure
        try:
            n = self._source.readinto(memoryview(buffer)[:_PIECE])
        except Exception as error:
            if not _is_damage(error):
                self._failure = error
                raise
            raise UserError(f"{self._name} is damaged: {error}") from error
        self._given += n
        read = self._raw.tell() - self._start
        if self._given > FREE_BYTES and self._given > MAX_EXPANSION * read:
            raise UserError(
                f"{self._name} expands more than {MAX_EXPANSION}-fold, which no text does; if it "
                "is one, decompress it first"
            )
        if self._longest is not None:
            newline = bytes(buffer[:n]).rfind(b"\n")
            self._line = self._line + n if newline < 0 else n - newline - 1
            if self._line > self._longest:
                raise UserError(
                    f"{self._name} has a line of more than {self._longest:,} bytes; split it"
                )
        return n


def _is_damage(error: Exception) -> bool:
    """Whether it is the content's: those of a disk have a number, a network's a class of theirs."""
    if isinstance(error, OSError):
        return type(error) in (OSError, gzip.BadGzipFile) and error.errno is None
    return isinstance(error, _DAMAGE)


class Frames(io.RawIOBase):
    """Decompressed bytes of frames, one after another; EOFError where the last is cut short.

    decompressor: makes one for each frame. padding: what may stand between frames. Use `zstd`,
    whose own reader ends at a cut as if the file were whole, or `xz`, whose own has no bound of
    memory.
    """

    # Small, because one byte can expand to 32 KiB: bounds the memory a hostile file can take.
    _CHUNK = 1024

    def __init__(self, raw: Any, decompressor: Callable[[], Any], padding: bytes = b""):
        self._raw, self._new, self._padding = raw, decompressor, padding
        self._frame, self._ready = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            chunk = self._raw.read(self._CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _decompress(self, chunk: bytes) -> bytes:
        out = []
        while chunk:
            if self._frame is None:
                chunk = chunk.lstrip(self._padding)
                if not chunk:
                    break
                self._frame = self._new()
            out.append(self._frame.decompress(chunk))
            chunk = b""
            if self._frame.eof:
                chunk, self._frame = self._frame.unused_data, None
        return b"".join(out)


def zstd(raw: Any) -> Frames:
    """The decompressed bytes of a file of zstd frames."""
    return Frames(raw, lambda: zstandard.ZstdDecompressor().decompressobj())


def xz(raw: Any) -> Frames:
    """The decompressed bytes of a file of xz streams."""
    return Frames(raw, lambda: lzma.LZMADecompressor(memlimit=_WINDOW), padding=b"\0")
