"""Compressed files in a data set's folder, which `datasets` reads: the bounds of `--input`."""

import bz2
import gzip
import io
import lzma
import random
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from datasets import config
from datasets.utils import file_utils  # here, not where memory is measured
from fsspec.compression import compr
from fsspec.exceptions import FSTimeoutError

from sparse_gpt.data import corpus, dataset_files
from sparse_gpt.errors import UserError

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ["gz", "bz2", "xz", "zst", "lz4", "zip"]
TEXTS = [f"text {n}" for n in range(3)]
FILES = {
    "a.jsonl": "".join(f'{{"text": "{text}"}}\n' for text in TEXTS),
    "a.txt": "".join(f"{text}\n" for text in TEXTS),
    "a.csv": "text\n" + "".join(f"{text}\n" for text in TEXTS),
}


def _zip(blocks: list[bytes], name: str = "a.jsonl", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, archive.open(name, "w") as member:
        for block in blocks:
            member.write(block)
    return out.getvalue()


def _compress(kind: str, name: str, block: bytes, copies: int = 1) -> bytes:
    """`copies` of a block in one file."""
    if kind == "zip":
        return _zip([block] * copies, name)
    if kind == "lz4":
        return pytest.importorskip("lz4.frame").compress(block) * copies
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return packed.get(kind, zstandard.compress)(block) * copies


def _folder(tmp_path, name: str, content: bytes) -> Path:
    folder = tmp_path / "who" / "what"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def _read(folder) -> list[str]:
    return list(corpus.iter_documents(corpus.dataset(str(folder), split="train")))


def _hooks() -> tuple:
    return dict(compr), fsspec.get_filesystem_class("zip"), file_utils._get_extraction_protocol


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_good_files_are_read(tmp_path, kind, name):
    """The same texts as without compression, also where a frame follows another."""
    content = FILES[name].encode()
    folder = _folder(tmp_path, f"{name}.{kind}", _compress(kind, name, content))
    before = _hooks()
    assert _read(folder) == TEXTS
    assert _hooks() == before
    if kind != "zip" and name != "a.csv":
        _folder(tmp_path, f"{name}.{kind}", _compress(kind, name, content, 2))
        assert _read(folder) == TEXTS * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_bombs(tmp_path, refused, kind, name):
    """2 GiB of zeros, less in a zip: the end comes long before, and without the memory."""
    copies = 8 if kind == "zip" else 128
    bomb = _compress(kind, name, bytes(16 * MIB), copies)
    assert len(bomb) < 10 * MIB
    folder = _folder(tmp_path, f"{name}.{kind}", bomb)
    before = _hooks()
    with refused(folder / f"{name}.{kind}", "expands more than 200-fold", mb=250):
        _read(folder)
    assert _hooks() == before


def test_a_bomb_of_rows(tmp_path, refused):
    """Rows come out of it before it is found to be one."""
    block = (b'{"text": "' + b"a" * 60_000 + b'"}\n') * 256
    folder = _folder(tmp_path, "a.jsonl.gz", gzip.compress(block) * 128)
    documents = corpus.iter_documents(corpus.dataset(str(folder), split="train"))
    assert len(next(documents)) == 60_000
    with refused(folder / "a.jsonl.gz", "expands more than 200-fold", mb=250):
        list(documents)


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonl.part"])
def test_bombs_known_by_their_first_bytes(tmp_path, refused, name):
    folder = _folder(tmp_path, name, gzip.compress(bytes(16 * MIB)) * 128)
    with refused(folder / name, "expands more than 200-fold", mb=250):
        _read(folder)


@pytest.mark.parametrize("name", FILES)
def test_bombs_that_nothing_decompresses(tmp_path, refused, name):
    """Of a name that tells `datasets` what they are, they stay bytes that are no text."""
    folder = _folder(tmp_path, name, gzip.compress(bytes(16 * MIB)) * 128)
    with refused(f"--dataset {folder}", "cannot be read", mb=32):
        _read(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_without_end(tmp_path, refused, monkeypatch, kind, name):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", MIB)
    content = FILES[name].encode() + b" " * (4 * MIB)
    folder = _folder(tmp_path, f"{name}.{kind}", _compress(kind, name, content))
    with refused(folder / f"{name}.{kind}", "has a line of more than 1,048,576 bytes", mb=80):
        _read(folder)
    lines = FILES[name].encode() + (b" " * (MIB - 1) + b"\n") * 4
    _folder(tmp_path, f"{name}.{kind}", _compress(kind, name, lines))
    assert _read(folder) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
def test_damage(tmp_path, refused, kind):
    whole = _compress(kind, "a.txt", FILES["a.txt"].encode())
    spoilt = whole[:-6]
    if kind == "zip":
        spoilt = _zip([b"text"], "a.txt", zipfile.ZIP_STORED).replace(b"text", b"txet", 1)
    folder = _folder(tmp_path, f"a.txt.{kind}", spoilt)
    with refused(folder / f"a.txt.{kind}", "is damaged"):
        _read(folder)


class Connection(io.BytesIO):
    """A file whose reads of certain numbers, from 1, fail."""

    fails: tuple[int, ...] = ()
    error: Exception = FSTimeoutError("timeout")
    reads = 0

    def read(self, *size):
        self.reads += 1
        if self.reads in self.fails:
            raise self.error
        return super().read(*size)


def _opened(kind: str, connection: Connection):
    """As `datasets` opens it, and what must stay for that."""
    with dataset_files.watched(MIB):
        if kind != "zip":
            name = {"gz": "gzip", "zst": "zstd"}.get(kind, kind)
            opener: Any = dict[Any, Any](compr)[name]
            file, archive = opener(connection, mode="rb"), None
        else:
            archive = fsspec.get_filesystem_class("zip")(connection)
            file = archive.open("a.txt")
    connection.reads = 0
    return file_utils._add_retries_to_file_obj_read_method(file), archive


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_fails_is_asked_again(monkeypatch, kind):
    """At once, where nothing that was read before is lost; the library's own way may lose it."""
    monkeypatch.setattr(config, "STREAMING_READ_RETRY_INTERVAL", 0)
    rng = random.Random(0)
    content = "".join(f"{rng.random()}\n" for _ in range(6000)).encode()
    packed = _compress(kind, "a.txt", content)
    for fails in ((1,), (3,), (2, 3, 5), (6,)):
        for size in (5000, MIB):
            connection = Connection(packed)
            file, _archive = _opened(kind, connection)
            connection.fails = fails
            found = b""
            while piece := file.read(size):
                found += piece
            assert found == content
            assert fails != (1,) or connection.reads > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [ConnectionError("Server Disconnected"), ConnectionResetError("gone"), OSError(5, "disk")],
    ids=lambda error: type(error).__name__,
)
def test_a_connection_that_is_lost_is_no_damage(kind, error):
    """It is said again: what comes after it in the buffers is not what comes after it."""
    connection = Connection(_compress(kind, "a.txt", bytes(range(256)) * 400))
    connection.error = error
    file, _archive = _opened(kind, connection)
    connection.fails = (1,)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            file.read(5000)
        assert raised.value is error


def test_a_window_of_xz_larger_than_any_file(tmp_path, refused):
    frame = bytearray(lzma.compress(b"text"))
    frame[16] = 40  # 4 GiB
    frame[20:24] = zlib.crc32(frame[12:20]).to_bytes(4, "little")
    folder = _folder(tmp_path, "a.txt.xz", bytes(frame))
    with refused(folder / "a.txt.xz", "is damaged: Memory usage limit exceeded"):
        _read(folder)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_of_zip_without_a_bound(tmp_path, refused, method):
    folder = _folder(tmp_path, "a.zip", _zip([bytes(16 * MIB)], method=method))
    with refused(folder / "a.zip", "neither stored nor deflated", mb=32):
        _read(folder)


@pytest.mark.parametrize("name", ["a.csv.gz.gz", "a.csv.zip"])
def test_compressed_twice(tmp_path, refused, name):
    """pandas would decompress the inner file by itself."""
    inner = gzip.compress(bytes(16 * MIB)) * 128
    bomb = gzip.compress(inner) if name.endswith("gz") else _zip([inner], "a.csv.gz")
    folder = _folder(tmp_path, name, bomb)
    with refused(folder / name, "is compressed twice", mb=32):
        _read(folder)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_archives_that_the_library_decodes_itself(tmp_path, refused, name):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if name.endswith("gz") else "w") as archive:
        archive.addfile(tarfile.TarInfo("a.text"))
    folder = _folder(tmp_path, name, out.getvalue())
    with refused(f"--dataset {folder}", "tar archives"):
        _read(folder)


def test_nothing_is_changed_between_rows(tmp_path):
    folder = _folder(tmp_path, "a.jsonl.gz", gzip.compress(FILES["a.jsonl"].encode()))
    before = _hooks()
    first = corpus.iter_documents(corpus.dataset(str(folder), split="train"))
    second = corpus.iter_documents(corpus.dataset(str(folder), split="train"))
    assert next(first) == next(second) == TEXTS[0]
    assert _hooks() == before
    first.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert _hooks() == before
    assert list(second) == TEXTS[1:]
    assert _hooks() == before
    assert corpus.dataset_splits(str(folder), None) == ["train"]
    assert _hooks() == before


def test_hooks_are_made_once(monkeypatch):
    """They are in while a row is read, a bad one too, and for none they are made anew."""
    made, before = [], _hooks()
    once = dataset_files._once
    monkeypatch.setattr(dataset_files, "_once", lambda inferred: made.append(1) or once(inferred))

    def split():
        for number in range(3):
            assert all(now != was for now, was in zip(_hooks(), before))
            yield number
        raise ValueError("a bad row")

    rows = dataset_files.rows(split(), "there", MIB)
    for number in range(3):
        assert next(rows) == (f"there row {number}", number)
        assert _hooks() == before
    with pytest.raises(UserError, match="there row 3 cannot be read: a bad row"):
        next(rows)
    assert _hooks() == before
    assert made == [1]


def test_the_command(tmp_path):
    """Exit code 2, one line, and the memory of the whole process."""
    folder = _folder(tmp_path, "a.txt.gz", gzip.compress(bytes(16 * MIB)) * 256)
    told = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]\n"
        "atexit.register(lambda: print(open('/proc/self/status').read()))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", told, ROOT / "launch" / "prepare_data.py"]
    command += ["--dataset", folder, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == UserError.code, result.stderr
    assert f"error: {folder / 'a.txt.gz'} expands more than 200-fold" in result.stderr
    assert "Traceback" not in result.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", result.stdout)
    assert peak is not None and int(peak[1]) < 700 * 1024
