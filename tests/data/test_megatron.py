"""Megatron-LM pairs, written here byte by byte from the format's description."""

import struct

import numpy as np
import pytest

from sparse_gpt.data import megatron
from sparse_gpt.data.loader import common_vocabulary
from sparse_gpt.data.shards import open_data
from sparse_gpt.data.tokenizer import byte_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import random_documents

EOS = 250
CODES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
DOCUMENTS = [[*(i % EOS for i in document), EOS] for document in random_documents(4, 40)]
FLAT = [i for document in DOCUMENTS for i in document]


def write_pair(prefix, documents=DOCUMENTS, code=8, sequences_each=1, **change) -> None:
    """documents: lists of ids; each is stored as `sequences_each` sequences."""
    sequences, boundaries = [], [0]
    for document in documents:
        cuts = np.array_split(document, sequences_each)
        sequences += [cut.tolist() for cut in cuts]
        boundaries.append(len(sequences))
    sizes = [len(sequence) for sequence in sequences]
    dtype = np.dtype(CODES.get(code, "<f4"))
    pointers = (np.cumsum([0, *sizes])[:-1] * dtype.itemsize).tolist()
    values = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "n_sequences": len(sizes),
        "n_boundaries": len(boundaries),
        "sizes": sizes,
        "pointers": pointers,
        "boundaries": boundaries,
        "tail": b"",
        **change,
    }
    index = values["magic"] + struct.pack("<QB", values["version"], code)
    index += struct.pack("<QQ", values["n_sequences"], values["n_boundaries"])
    index += np.array(values["sizes"], "<i4").tobytes()
    index += np.array(values["pointers"], "<i8").tobytes()
    index += np.array(values["boundaries"], "<i8").tobytes() + values["tail"]
    content = np.array([i for s in sequences for i in s], dtype).tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(content)


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "corpus_text_document"


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("sequences_each", [1, 3])
def test_round_trip(prefix, code, sequences_each):
    write_pair(prefix, code=code, sequences_each=sequences_each)
    data = open_data(prefix, val_fraction=0.1)
    train, val = data.split("train"), data.split("val")
    assert (data.vocab_size, data.eos_id) == (EOS + 1, EOS)
    assert data.tokenizer_sha256 is None and data.tokenizer_path is None
    assert (train.n_bytes, train.n_words) == (None, None)
    joined = [*train.read(0, train.n_tokens), *val.read(0, val.n_tokens)]
    assert joined == FLAT
    assert train.n_documents + val.n_documents == len(DOCUMENTS)
    lengths = [*np.diff(train.document_starts[:]), *np.diff(val.document_starts[:])]
    assert lengths == [len(document) for document in DOCUMENTS]
    numbers = np.repeat(np.arange(train.n_documents), np.diff(train.document_starts[:]).astype(int))
    assert train.document_ids(0, train.n_tokens).tolist() == numbers.tolist()


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.3, 0.9999])
def test_held_out_are_the_last_documents(prefix, fraction):
    write_pair(prefix)
    data = open_data(prefix, val_fraction=fraction)
    val = data.split("val")
    assert data.split("train").n_documents >= 1 and val.n_documents >= 1
    assert val.read(0, val.n_tokens).tolist() == FLAT[len(FLAT) - val.n_tokens :]
    if fraction < 0.9:
        without_first = val.n_tokens - int(val.document_starts[:][1])
        assert without_first < fraction * len(FLAT) <= val.n_tokens or val.n_documents == 1


def test_no_holdout_and_one_document(prefix):
    write_pair(prefix, documents=DOCUMENTS[:1])
    with pytest.raises(UserError, match="set val_fraction 0"):
        open_data(prefix)
    assert list(open_data(prefix, val_fraction=0).splits) == ["train"]
    with pytest.raises(UserError, match="val_fraction is 1"):
        open_data(prefix, val_fraction=1)


def test_given_vocabulary(prefix):
    write_pair(prefix)
    assert open_data(prefix, vocab_size=50_304).vocab_size == 50_304
    train = open_data(prefix, vocab_size=EOS).split("train")
    with pytest.raises(UserError, match="outside the vocabulary"):
        train.read(0, train.n_tokens)


def test_given_tokenizer(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_largest", None)  # no pass over the tokens
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    write_pair(prefix)
    data = open_data(prefix, tokenizer=tmp_path / "tokenizer")
    assert (data.vocab_size, data.eos_id) == (257, 256)
    assert data.tokenizer_path == tmp_path / "tokenizer"
    assert data.tokenizer_sha256 == tokenizer.sha256
    padded = open_data(prefix, tokenizer=tmp_path / "tokenizer", vocab_size=320)
    assert padded.vocab_size == 320
    with pytest.raises(UserError, match="vocab_size 256 is smaller than the 257 tokens"):
        open_data(prefix, tokenizer=tmp_path / "tokenizer", vocab_size=256)

    write_pair(prefix, documents=[[1, 256], [2, 257, 256]])
    for vocab_size in (None, 320):
        data = open_data(prefix, tokenizer=tmp_path / "tokenizer", vocab_size=vocab_size)
        assert data.split("train").read(0, 2).tolist() == [1, 256]
        with pytest.raises(UserError, match="token 1 is 257, outside the vocabulary of 257"):
            data.split("val").read(0, 3)


def test_two_corpora_of_one_tokenizer(tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer")
    write_pair(tmp_path / "a", documents=[[1, 256], [2, 256]])
    write_pair(tmp_path / "b", documents=[[9, 8], [7, 6]])  # no end tokens, smaller ids
    guessed = [open_data(tmp_path / name) for name in "ab"]
    with pytest.raises(UserError, match="different tokenizers"):
        common_vocabulary(guessed)
    said = [open_data(tmp_path / name, tokenizer=tmp_path / "tokenizer") for name in "ab"]
    assert common_vocabulary(said) == (257, 256)
    sized = [open_data(tmp_path / name, vocab_size=300) for name in "ab"]
    assert common_vocabulary(sized)[0] == 300


def test_a_tokenizer_without_its_file(prefix, tmp_path):
    write_pair(prefix)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"tokenizer {path} is not a folder with a tokenizer"):
            open_data(prefix, tokenizer=path)


def test_mode_bytes_and_empty_documents(prefix):
    documents = [[], *DOCUMENTS[:3], [], [], *DOCUMENTS[3:], []]
    write_pair(prefix, documents=documents, tail=bytes(len(documents)))
    train = open_data(prefix, val_fraction=0).split("train")
    assert train.n_documents == len(DOCUMENTS)
    assert train.read(0, train.n_tokens).tolist() == FLAT


def test_identity(prefix, tmp_path):
    write_pair(prefix)
    write_pair(tmp_path / "moved")
    assert open_data(prefix).identity == open_data(tmp_path / "moved").identity
    assert open_data(prefix).identity != open_data(prefix, val_fraction=0.5).identity


N = len(DOCUMENTS)
BAD = {
    "magic": ({"magic": b"MMIDIDY\x00\x00"}, "not a Megatron index"),
    "version": ({"version": 2}, "version 2"),
    "float": ({"code": 6}, "dtype code 6"),
    "huge count": ({"n_sequences": 2**62}, "it is damaged"),
    "huge boundaries": ({"n_boundaries": 2**63}, "it is damaged"),
    "short": ({"n_sequences": N + 1}, "it is damaged"),
    "no documents": (
        {"n_sequences": 0, "n_boundaries": 1, "sizes": [], "pointers": [], "boundaries": [0]},
        "holds no documents",
    ),
    "negative length": ({"sizes": [-1] * N}, "sequence 0 is negative"),
    "lengths": ({"sizes": [1] * N}, "does not follow"),
    "pointers": ({"pointers": [0] * N}, "does not follow"),
    "boundary range": ({"boundaries": [0, *range(2, N + 2)]}, "run from 0 to"),
    "falling": ({"boundaries": [0, 5, 2, *range(3, N + 1)]}, "boundaries fall"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_index(prefix, name):
    change, message = BAD[name]
    write_pair(prefix, **change)
    with pytest.raises(UserError, match=message):
        open_data(prefix)


def test_damaged_tokens(prefix):
    write_pair(prefix)
    path = prefix.with_name(prefix.name + ".bin")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="no number of 2-byte tokens"):
        open_data(prefix)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match="add up to"):
        open_data(prefix)
    write_pair(prefix, documents=[[1, -5, 2], [3]], code=4)
    with pytest.raises(UserError, match="token 1 is negative"):
        open_data(prefix)
    index = prefix.with_name(prefix.name + ".idx")
    index.write_bytes(index.read_bytes()[:20])
    with pytest.raises(UserError, match="not a Megatron index"):
        open_data(prefix)
    index.unlink()
    with pytest.raises(UserError, match="does not exist"):
        open_data(prefix)
