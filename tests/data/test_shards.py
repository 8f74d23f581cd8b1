"""Token files give back what was written; whatever does not fit together is refused by name."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.shards import open_data, verify
from sparse_gpt.errors import UserError
from tests.data.fixtures import make_folder, random_documents

DOCUMENTS = random_documents(0, 300)
FLAT = np.array([i for document in DOCUMENTS for i in [*document, 256]])
NUMBERS = np.repeat(np.arange(300), [len(document) + 1 for document in DOCUMENTS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    splits = {"train": DOCUMENTS, "val": DOCUMENTS[:3]}
    return make_folder(tmp_path_factory.mktemp("data") / "made", splits)


@pytest.fixture
def copy(tmp_path):
    return make_folder(tmp_path / "copy", {"train": DOCUMENTS, "val": DOCUMENTS[:3]})


def test_counts_and_names(folder):
    data = open_data(folder)
    assert list(data.splits) == ["train", "val"]
    train = data.split("train")
    assert (train.n_tokens, train.n_documents) == (len(FLAT), 300)
    assert (train.n_bytes, train.n_words) == (0, 0)
    assert (data.vocab_size, data.eos_id) == (257, 256)
    assert data.tokenizer_path == folder / "tokenizer"
    assert len(list(folder.glob("train-*.bin"))) == -(-len(FLAT) // 1000)
    verify(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_windows_across_shards(folder, data):
    train = open_data(folder).split("train")
    start = data.draw(st.integers(0, len(FLAT)))
    n = data.draw(st.integers(0, len(FLAT) - start))
    tokens, documents = train.read(start, n), train.document_ids(start, n)
    assert tokens.dtype == np.int64 and documents.dtype == np.int32
    assert np.array_equal(tokens, FLAT[start : start + n])
    assert np.array_equal(documents, NUMBERS[start : start + n])


@pytest.mark.parametrize(("start", "n"), [(-1, 1), (0, len(FLAT) + 1), (len(FLAT), 1), (0, -1)])
def test_windows_outside(folder, start, n):
    train = open_data(folder).split("train")
    with pytest.raises(IndexError):
        train.read(start, n)
    with pytest.raises(IndexError):
        train.document_ids(start, n)


def test_large_ids_use_uint32(tmp_path):
    documents = random_documents(1, 20, vocab_size=200_000)
    made = make_folder(tmp_path / "x", {"train": documents}, 200_001, 200_000, "uint32")
    train = open_data(made).split("train")
    flat = [i for document in documents for i in [*document, 200_000]]
    assert max(flat[:-1]) > 65_536
    assert train.read(0, train.n_tokens).tolist() == flat


def test_identity_is_of_the_tokens(folder, tmp_path):
    splits = {"train": DOCUMENTS, "val": DOCUMENTS[:3]}
    same = make_folder(tmp_path / "elsewhere", splits)
    index = json.loads((same / "index.json").read_text())
    index["source"] = {"train": {"kind": "other"}}
    (same / "index.json").write_text(json.dumps(index))
    assert open_data(same).identity == open_data(folder).identity
    other = make_folder(tmp_path / "other", {"train": DOCUMENTS[::-1], "val": DOCUMENTS[:3]})
    assert open_data(other).identity != open_data(folder).identity


def _edit(folder, change) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def _entry(index) -> dict:
    return index["splits"]["train"]


BAD_INDEX = {
    "other format": (lambda i: i.update(format="x"), "not an index of prepared data"),
    "newer version": (lambda i: i.update(version=2), "format version 2"),
    "unknown key": (lambda i: i.update(extra=1), "extra"),
    "missing key": (lambda i: i.pop("eos_id"), "eos_id"),
    "text as number": (lambda i: i.update(vocab_size="257"), "vocab_size"),
    "negative count": (lambda i: _entry(i).update(documents=-1), "documents"),
    "dtype": (lambda i: i.update(dtype="int8"), "dtype"),
    "traversal": (
        lambda i: _entry(i)["shards"][0].update(file="../copy/train-00000.bin"),
        "not a plain file name",
    ),
    "absolute": (lambda i: _entry(i).update(documents_file="/etc/passwd"), "plain file name"),
    "hidden": (lambda i: _entry(i).update(documents_file=".doc.npy"), "plain file name"),
    "backslash": (lambda i: _entry(i)["shards"][0].update(file="a\\b"), "plain file name"),
    "total": (lambda i: _entry(i).update(tokens=5), "says 5 tokens"),
    "lying shard": (
        lambda i: (
            _entry(i)["shards"][0].update(tokens=999),
            _entry(i)["shards"][1].update(tokens=1001),
        ),
        "has 2000 bytes, but 999 tokens",
    ),
    "missing file": (lambda i: _entry(i)["shards"][0].update(file="no.bin"), "no.bin is missing"),
    "documents": (lambda i: _entry(i).update(documents=299), "says 299 documents"),
    "huge count": (
        lambda i: (
            _entry(i).update(tokens=2**60),
            _entry(i).update(shards=[{**_entry(i)["shards"][0], "tokens": 2**60}]),
        ),
        "are expected",
    ),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_lying_index(copy, name):
    change, message = BAD_INDEX[name]
    _edit(copy, change)
    with pytest.raises(UserError, match=message):
        open_data(copy)


def test_no_index_no_data(copy, tmp_path):
    (copy / "index.json").rename(copy / "index.json.tmp")
    with pytest.raises(UserError, match=r"has no index\.json"):
        open_data(copy)
    (copy / "index.json").write_text('{"format": "spar')
    with pytest.raises(UserError, match="not valid JSON"):
        open_data(copy)
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="neither a folder"):
        open_data(tmp_path / "file")


def test_unknown_split(folder):
    with pytest.raises(UserError, match="no split 'test'; it has: train, val"):
        open_data(folder).split("test")


def test_link_out_of_the_folder(copy, tmp_path):
    outside = tmp_path / "outside.bin"
    (copy / "train-00000.bin").rename(outside)
    (copy / "train-00000.bin").symlink_to(outside)
    with pytest.raises(UserError, match="leads out of the folder"):
        open_data(copy)


def test_truncated_and_torn_files(copy):
    content = (copy / "train-00001.bin").read_bytes()
    (copy / "train-00001.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train-00001\.bin has 1999 bytes"):
        open_data(copy)
    (copy / "train-00001.bin").write_bytes(content)
    (copy / "train.doc.npy").write_bytes(b"not numpy")
    with pytest.raises(UserError, match=r"train\.doc\.npy cannot be read"):
        open_data(copy)


def test_pickled_boundaries_are_not_loaded(copy):
    np.save(copy / "train.doc.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        open_data(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.astype(np.int64), "uint64"),
        (lambda s: np.concatenate([[1], s[1:]]).astype(np.uint64), "run from 1"),
        (lambda s: np.concatenate([s[:-1], s[-1:] + np.uint64(1)]), "run from 0"),
        (lambda s: np.concatenate([s[:5], s[4:5], s[6:]]), "do not rise"),
    ],
)
def test_wrong_boundaries(copy, change, message):
    starts = np.load(copy / "train.doc.npy")
    np.save(copy / "train.doc.npy", change(starts))
    with pytest.raises(UserError, match=message):
        open_data(copy)


def test_verify_finds_one_flipped_bit(copy):
    path = copy / "train-00003.bin"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(bytes(content))
    open_data(copy)
    verify(copy, full=False)
    with pytest.raises(UserError, match=r"train-00003\.bin: sha256 differs"):
        verify(copy)


def test_the_tokenizer_must_be_that_of_the_index(copy):
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # formatting only
    open_data(copy)
    content = path.read_text()
    assert '"\\u0100"' in content
    path.write_text(content.replace('"\\u0100"', '"\\u3042"'))
    with pytest.raises(UserError, match=f"data path {copy}: the tokenizer .* not the one of the"):
        open_data(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"there is no tokenizer\.json in .*copy/tokenizer"):
        open_data(copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match=f"data path {copy}: the tokenizer folder is missing"):
        open_data(copy)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_another_end_token_is_another_tokenizer(copy, name):
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    path = copy / "tokenizer" / name
    path.write_text(json.dumps({"eos_token": "a"}))
    with pytest.raises(UserError, match="not the one of the index"):
        open_data(copy)


def test_verify_compares_vocabulary_and_end_token(copy):
    _edit(copy, lambda index: index.update(vocab_size=300))
    open_data(copy)
    with pytest.raises(UserError, match="vocab_size 300 and eos_id 256, its tokenizer has 257"):
        verify(copy)


def test_settings_of_megatron_pairs_are_refused(folder):
    with pytest.raises(UserError, match="which has its own vocab_size; drop vocab_size"):
        open_data(folder, vocab_size=300)
    with pytest.raises(UserError, match="which has its own tokenizer; drop tokenizer"):
        open_data(folder, tokenizer=folder / "tokenizer")


def test_ids_outside_the_vocabulary(copy):
    _edit(copy, lambda index: index.update(vocab_size=200, eos_id=199))
    train = open_data(copy).split("train")
    bad = int(np.argmax(FLAT >= 200))
    train.read(0, bad)
    with pytest.raises(UserError, match=f"token {bad} is {FLAT[bad]}, outside the vocabulary"):
        train.read(0, bad + 10)


def test_verify_wants_end_tokens(tmp_path):
    made = make_folder(tmp_path / "x", {"train": [[1, 2], [3]]})
    _edit(made, lambda index: index.update(eos_id=3))
    with pytest.raises(UserError, match="ends at token 2 has no end token"):
        verify(made)
