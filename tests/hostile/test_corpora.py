"""Texts that are none, that never end, or that unfold into more than a disk holds."""

import gzip
import io
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sparse_gpt.data import corpus, decompression, text_files
from sparse_gpt.errors import UserError

MIB = 1 << 20


def read(path, **options):
    settings = {"text_field": "text", "encoding": "utf-8", "lines": False, "limit": MIB}
    return list(text_files.read_texts(path, **{**settings, **options}))


NO_TEXT = {
    "deep.jsonl": b'{"text": ' + b"[" * 100_000,
    "deep_objects.jsonl": b'{"a":' * 100_000,
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
    "surrogate.jsonl": b'{"text": "\\udfff\\ud800"}',
    "utf16.txt": "text".encode("utf-16"),
    "utf16.jsonl": '{"text": "x"}'.encode("utf-16"),
    "cesu.txt": b"\xed\xa0\x80\xed\xb0\x80",
    "overlong.txt": b"\xc0\xaf",
    "beyond.txt": b"\xf5\x80\x80\x80",
    "random.txt": random.Random(1).randbytes(5000),
    "random.jsonl": random.Random(2).randbytes(5000),
    "nan.jsonl": b"NaN",
    "text.jsonl": b'"text"',
    "many_fields.jsonl": json.dumps({f"k{n}": 1 for n in range(20_000)}).encode(),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text(tmp_path, refused, name):
    path = tmp_path / name
    path.write_bytes(NO_TEXT[name])
    with refused(path, mb=8):
        read(path)


def test_odd_text_stays_what_it_is(tmp_path):
    odd = "a\0b\x1b[31m\u202e\ufffe\U0010ffff\u2028\x85"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + odd.encode())
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": odd}).encode())
    assert read(tmp_path / "a.txt") == read(tmp_path / "b.jsonl") == [odd]
    duplicate = b'{"text": "first", "text": "second"}'  # as every reader of such files takes it
    (tmp_path / "c.jsonl").write_bytes(duplicate)
    assert read(tmp_path / "c.jsonl") == ["second"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_without_end(tmp_path, refused, name):
    """A file of a terabyte, which takes no room on the disk and must take none in memory."""
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with refused(tmp_path / name, "more than 1,048,576 bytes", mb=8):
        read(tmp_path / name)
    with refused(tmp_path / name, mb=8):
        read(tmp_path / name, lines=True)


def _bomb(kind: str, filling: bytes, copies: int) -> bytes:
    """`copies` times 16 MiB, compressed."""
    block = filling * (16 * MIB // len(filling))
    return (gzip.compress(block) if kind == "gz" else zstandard.compress(block, 19)) * copies


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("filling", [b"\0", b" " * 4095 + b"\n"], ids=["one line", "blank lines"])
def test_bombs(tmp_path, refused, kind, name, filling):
    """4 GiB in less than 6 MB: the end comes long before that, and without the memory."""
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes(_bomb(kind, filling, 256))
    assert path.stat().st_size < 6_000_000
    with refused(path, "-fold", mb=250):
        read(path, limit=1 << 30)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_bomb_within_the_limit_of_a_document(tmp_path, refused, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(_bomb(kind, b" ", 2))
    with refused(path, "has a line of more than 1,048,576 bytes", mb=80):
        read(path)


def test_what_text_compresses_to_is_read(tmp_path):
    """A repetitive log, a thousandfold: below the bytes that are always free."""
    text = "the same line again\n" * 500_000
    for kind, packed in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"a.txt.{kind}"
        path.write_bytes(packed(text.encode()))
        assert decompression.MAX_EXPANSION * path.stat().st_size < len(text) or kind == "gz"
        assert read(path, limit=16 * MIB) == [text]


def test_a_window_of_zstd_larger_than_any_file(tmp_path, refused):
    """A frame may ask for a window of terabytes; the library's own bound is 128 MiB."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, (41 - 10) << 3]) + b"\x01\x00\x00"
    (tmp_path / "a.txt.zst").write_bytes(frame)
    with refused(tmp_path / "a.txt.zst", "is damaged", mb=4):
        read(tmp_path / "a.txt.zst")


def _parquet(path, values: pa.Array) -> bytes:
    pq.write_table(pa.table({"text": values}), path)
    return path.read_bytes()


def test_parquet_that_is_junk(tmp_path, refused):
    """Cut anywhere and bytes changed anywhere: an error that names the file, or rows of text."""
    path = tmp_path / "a.parquet"
    whole = _parquet(path, pa.array([f"document {n}" for n in range(200)]))
    rng = random.Random(0)
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        with refused(path):
            read(path)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        said = str(path)
        try:
            assert all(isinstance(text, str) for text in read(path))
        except UserError as error:
            said = str(error)
        assert str(path) in said
    path.write_bytes(b"PAR1" + rng.randbytes(4000) + b"\xff\xff\xff\x7fPAR1")
    with refused(path):
        read(path)


def test_parquet_that_is_no_text(tmp_path, refused):
    path = tmp_path / "a.parquet"
    offsets, content = pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")
    _parquet(path, pa.StringArray.from_buffers(1, offsets, content))
    with refused(path):
        read(path)
    for values in (
        pa.array([b"x"]),
        pa.array([None], pa.string()),
        pa.array([3]),
        pa.array([["x"]]),
    ):
        _parquet(path, values)
        with refused(path, "row 0"):
            read(path)


def test_a_document_of_parquet_over_the_limit(tmp_path, refused):
    path = tmp_path / "a.parquet"
    _parquet(path, pa.array(["x" * (2 * MIB)]))
    with refused(path, "row 0", "more than 1,048,576 bytes"):
        read(path)


def test_dictionaries_unfold_a_few_rows_at_a_time(tmp_path):
    """200 MB of text in a small file: one text, 200 times."""
    path = tmp_path / "a.parquet"
    _parquet(path, pa.array(["x" * MIB] * 200).dictionary_encode())
    assert path.stat().st_size < 4 * MIB
    tracemalloc.start()
    rows = sum(1 for _ in text_files.read_texts(
        path, text_field="text", encoding="utf-8", lines=False, limit=2 * MIB))  # fmt: skip
    assert rows == 200
    assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    tracemalloc.stop()


def _set(tmp_path, files: dict[str, bytes], card: str = ""):
    folder = tmp_path / "who" / "what"
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["harmless"]}), table)
    for name, content in {"train.parquet": table.getvalue(), **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("name", ["what.py", "data/what.py", "a/b/c/x.PY", "__pycache__/what.pyc",
                                  "lib/native.so", "snapshots/0123/what.py"])  # fmt: skip
def test_data_sets_with_code(tmp_path, marker, refused, name):
    """Beside the data, in a subfolder, and in the layout of the hub's cache."""
    script = f"import os\nos.mkdir({str(marker)!r})\n".encode()
    infos = json.dumps({"default": {"builder_name": "what", "splits": {}}}).encode()
    folder = _set(tmp_path, {name: script, "dataset_infos.json": infos})
    with refused(f"--dataset {folder} holds Python code ({name})", "data sets that run code"):
        corpus.dataset_splits(str(folder), None)


@pytest.mark.parametrize(
    "path",
    ["../../secret.txt", "/etc/hostname", "https://example.org/x.txt", "filecache::/etc/hostname"],
)
def test_data_sets_that_take_files_from_elsewhere(tmp_path, refused, path):
    (tmp_path / "secret.txt").write_text("secret")
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]
    folder = _set(tmp_path, {}, f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with refused(f"--dataset {folder}", mb=100):
        corpus.dataset_splits(str(folder), None)


def test_a_harmless_data_set_is_read(tmp_path):
    folder = _set(tmp_path, {})
    source = corpus.dataset(str(folder), split="train")
    assert list(corpus.iter_documents(source)) == ["harmless"]


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_description_without_end(tmp_path, refused, name):
    folder = _set(tmp_path, {})
    with open(folder / name, "wb") as file:
        file.truncate(1 << 40)
    with refused(folder / name, "has more than 16,777,216 bytes"):
        list(corpus.iter_documents(corpus.dataset(str(folder), split="train")))
