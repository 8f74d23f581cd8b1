"""Reading local files of every kind, and refusing damaged ones by name and place."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sparse_gpt.data import text_files
from sparse_gpt.errors import UserError
from tests.data.fixtures import AWKWARD, prose

TEXTS = [text for text in AWKWARD if text] + [prose(1, 2000)]
JSONL = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def _read(path, **options) -> list[str]:
    settings = {"text_field": "text", "encoding": "utf-8", "lines": False, "limit": 10**6}
    return list(text_files.read_texts(path, **{**settings, **options}))


def _write(path, content: bytes):
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_txt_is_one_document_kept_exactly(tmp_path, end):
    text = "".join(TEXTS)
    path = _write(tmp_path / f"a.txt{end}", text.encode())
    assert _read(path) == [text]
    path = _write(tmp_path / f"b.txt{end}", b"\xef\xbb\xbf" + text.encode())
    assert _read(path) == [text]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, end):
    assert _read(_write(tmp_path / f"a.jsonl{end}", JSONL)) == TEXTS
    blank = b"\n" + JSONL.replace(b"}\n", b"}\r\n\n")
    assert _read(_write(tmp_path / f"b.jsonl{end}", blank)) == TEXTS


def test_several_compressed_frames(tmp_path):
    half = len(JSONL) // 2
    parts = [JSONL[:half], JSONL[half:]]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    assert _read(tmp_path / "a.jsonl.zst") == _read(tmp_path / "a.jsonl.gz") == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert _read(tmp_path / "a.parquet", text_field="body") == TEXTS
    with pytest.raises(UserError, match=r"no column 'text'; it has: id, body; set --text-field"):
        _read(tmp_path / "a.parquet")


def test_lines_of_txt(tmp_path):
    path = _write(tmp_path / "a.txt", b"one\n\ntwo \n three")
    assert _read(path, lines=True) == ["one\n", "\n", "two \n", " three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2 is not an object"),
        (b'{"body": "a"}\n', "line 1 has no field 'text'; it has: body; set --text-field"),
        (b'{"text": 3}\n', "line 1: field 'text' is int"),
        (b'{"text": null}\n', "is NoneType, not a string"),
        (b'{"text": "\\ud800x"}\n', "lone surrogate at character 0"),
        (b'{"text": "\xff"}\n', "line 1 is not valid JSON"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = _write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=message) as caught:
        _read(path)
    assert str(path) in str(caught.value)


def test_bad_text(tmp_path):
    path = _write(tmp_path / "a.txt", "café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: byte 3 is not utf-8; convert it or set"):
        _read(path)
    assert _read(path, encoding="latin-1") == ["café"]
    with pytest.raises(UserError, match="--encoding 'klingon'"):
        _read(path, encoding="klingon")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst"])
def test_documents_over_the_limit(tmp_path, name):
    line = json.dumps({"text": "x" * 5000}).encode()
    with pytest.raises(UserError, match="more than 1,000 bytes; split it"):
        _read(_write(tmp_path / name, line), limit=1000)


def test_the_limit_of_a_row_is_of_bytes(tmp_path):
    """Of 400 characters, which are 1,200 bytes."""
    table = pyarrow.table({"text": ["short", "漢" * 400]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(_read(tmp_path / "a.parquet", limit=1200)) == 2
    with pytest.raises(UserError, match="row 1 is a document of more than 1,199 bytes; split it"):
        _read(tmp_path / "a.parquet", limit=1199)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_damaged_compression(tmp_path, name, damage):
    path = _write(tmp_path / name, JSONL if "jsonl" in name else prose(1, 500).encode())
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "changed":
        for at in range(len(content) // 2, len(content)):
            content[at] ^= 0x55
    else:
        content = bytearray(b"plain text")
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is damaged"):
        _read(path)


def test_damaged_parquet(tmp_path):
    path = _write(tmp_path / "a.parquet", b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a readable parquet file"):
        _read(path)


def test_find(tmp_path):
    for name in ["b/2.txt", "b/1.jsonl.gz", "a.parquet", "c/.hidden.txt", ".git/x.txt", "z.md"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "d.txt").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in text_files.find([tmp_path])]
    assert names == ["a.parquet", "b/1.jsonl.gz", "b/2.txt"]
    assert text_files.find([tmp_path / "b" / "2.txt"]) == [tmp_path / "b" / "2.txt"]
    with pytest.raises(UserError, match=r"--input .*nope does not exist"):
        text_files.find([tmp_path / "nope"])
    with pytest.raises(UserError, match=r"z\.md: known kinds are \.txt"):
        text_files.find([tmp_path / "z.md"])
    with pytest.raises(UserError, match="holds no"):
        text_files.find([tmp_path / "c"])
