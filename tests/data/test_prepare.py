"""Preparation end to end: the tokens are the documents, whatever the workers; failures leave
no data behind."""

import errno
import itertools
import shutil
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest

from sparse_gpt.data import corpus, prepare
from sparse_gpt.data.holdout import HoldoutRule
from sparse_gpt.data.prepare import PrepareOptions
from sparse_gpt.data.shards import open_data, verify
from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import AWKWARD, prose

TEXTS = [prose(seed, 300) for seed in range(40)] + [t for t in AWKWARD if t.strip()]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    (folder / "blank.txt").write_text("\n \n")
    return corpus.files([folder])


@pytest.fixture
def options(tmp_path, source):
    return PrepareOptions(
        out=tmp_path / "out",
        sources={"train": source},
        tokenizer="bpe",
        vocab_size=400,
        holdout=HoldoutRule(3, 0.2, test_fraction=0.1),
        shard_tokens=3000,
    )


def _documents(split) -> list[list[int]]:
    starts = split.document_starts[:].astype(int)
    tokens = split.read(0, split.n_tokens)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]


def _contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _left(options) -> list[str]:
    """What lies in the folder of --out, the input apart."""
    return sorted(path.name for path in options.out.parent.iterdir() if path.name != "input")


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe", "bpe", "bytes"])
def test_shards_hold_the_documents(options, kind):
    vocab_size = None if kind == "bytes" else 400
    options = replace(options, tokenizer=kind, vocab_size=vocab_size)
    index = prepare.prepare(options)
    verify(options.out)
    data = open_data(options.out)
    tokenizer = load_tokenizer(options.out / "tokenizer")
    assert list(data.splits) == ["train", "val", "test"]
    assert data.tokenizer_sha256 == tokenizer.sha256 == index.tokenizer_sha256
    found = []
    for split in data.splits.values():
        documents = _documents(split)
        assert documents, "every split has documents"
        texts = []
        for document in documents:
            assert document[-1] == data.eos_id
            texts.append(tokenizer.decode(document[:-1]))
            assert document[:-1] == tokenizer.encode(texts[-1])
        assert split.n_bytes == sum(len(text.encode()) for text in texts)
        assert split.n_words == sum(len(text.split()) for text in texts)
        assert texts == [text for text in TEXTS if text in texts]  # the order of the source
        found += texts
    assert sorted(found) == sorted(TEXTS)


def test_auto_tokenizer_on_the_folder(options):
    from transformers import AutoTokenizer

    prepare.prepare(replace(options, tokenizer="sentencepiece"))
    stock = AutoTokenizer.from_pretrained(options.out / "tokenizer")
    documents = _documents(open_data(options.out).split("train"))
    texts = [text for text in TEXTS if stock(text)["input_ids"] + [stock.eos_token_id] in documents]
    assert len(texts) == len(documents)


def test_workers_do_not_matter(options, tmp_path):
    prepare.prepare(options)
    several = replace(options, out=tmp_path / "several", workers=2)
    prepare.prepare(several)
    assert _contents(options.out) == _contents(several.out)
    assert len(list(options.out.glob("train-*.bin"))) > 2


def test_identity_and_seed(options, tmp_path):
    prepare.prepare(options)
    other = replace(options, out=tmp_path / "b", holdout=replace(options.holdout, seed=4))
    prepare.prepare(other)
    assert open_data(options.out).identity != open_data(other.out).identity


def test_a_given_tokenizer(options, tmp_path):
    prepare.prepare(options)
    again = replace(
        options, out=tmp_path / "b", tokenizer=str(options.out / "tokenizer"), vocab_size=None
    )
    prepare.prepare(again)
    assert open_data(again.out).identity == open_data(options.out).identity
    with pytest.raises(UserError, match="--vocab-size is for a tokenizer that is trained"):
        prepare.prepare(replace(again, out=tmp_path / "c", vocab_size=400))


def test_the_tokenizer_never_sees_held_out_text(options, monkeypatch):
    seen = []
    train = prepare.train_tokenizer

    def spy(kind, texts, *args, **kwargs):
        seen.extend(texts)
        return train(kind, iter(seen), *args, **kwargs)

    monkeypatch.setattr(prepare, "train_tokenizer", spy)
    prepare.prepare(options)
    data = open_data(options.out)
    tokenizer = load_tokenizer(options.out / "tokenizer")
    text = "".join(seen)
    for name, split in data.splits.items():
        for document in _documents(split):
            assert (tokenizer.decode(document[:-1]) in text) == (name == "train")


def test_the_sample_is_spread_and_limited(options, monkeypatch):
    sizes = []

    def measure(kind, texts, *args, **kwargs):
        pieces = list(texts)
        sizes.append(sum(len(piece.encode()) for piece in pieces))
        raise UserError("measured")

    monkeypatch.setattr(prepare, "train_tokenizer", measure)
    monkeypatch.setattr(prepare, "_SAMPLE_PIECE", 50)
    for limit in (10_000, 40_000):
        with pytest.raises(UserError, match="measured"):
            prepare.prepare(replace(options, tokenizer_sample_bytes=limit))
    assert 0 < sizes[0] < 20_000 < sizes[1] < 60_000


def test_given_splits_are_not_held_out(options, tmp_path):
    validation = tmp_path / "validation.txt"
    validation.write_text("only this")
    sources = {"val": corpus.files([validation]), **options.sources}
    prepare.prepare(replace(options, sources=sources))
    data = open_data(options.out)
    assert {name: split.n_documents for name, split in data.splits.items()} == {
        "train": len(TEXTS),
        "val": 1,
    }


def test_splits_without_train(options, tmp_path):
    prepare.prepare(replace(options, sources={"test": options.sources["train"]}))
    assert open_data(options.out).split("test").n_documents == len(TEXTS)


def test_downloads_happen_once(options, monkeypatch):
    reads = []
    iterate = prepare.iter_counted

    def counting(source):
        reads.append(source)
        return iterate(source)

    monkeypatch.setattr(prepare, "iter_counted", counting)
    prepare.prepare(options)
    local = _contents(options.out)
    assert len(reads) > 1
    reads.clear()
    monkeypatch.setattr(corpus.Source, "remote", property(lambda self: True))
    prepare.prepare(replace(options, overwrite=True))
    assert len(reads) == 1
    assert _contents(options.out) == local  # and the kept copy is gone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "wordpiece"}, "--tokenizer wordpiece is neither a path"),
        ({"tokenizer_sample_bytes": 0}, "--tokenizer-sample-bytes"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"workers": 0}, "--workers is 0"),
        ({"vocab_size": 100_000}, "the text supports only"),
        ({"holdout": HoldoutRule(val_documents=1000)}, "needs at least 1001"),
        ({"sources": {}}, "split map is empty"),
    ],
)
def test_bad_options(options, change, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(replace(options, **change))
    assert _left(options) == []


def test_bad_split_name_and_size(options):
    source = options.sources["train"]
    with pytest.raises(UserError, match=r"'\.\./x' is no split name"):
        prepare.prepare(replace(options, sources={"../x": source}))
    with pytest.raises(UserError, match="--max-bytes is 0"):
        prepare.prepare(replace(options, sources={"train": replace(source, max_bytes=0)}))


def test_empty_and_single_corpora(options, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    with pytest.raises(UserError, match="the corpus is empty"):
        prepare.prepare(replace(options, sources={"train": corpus.files([blank])}))
    blank.write_text(prose(0, 2000))
    single = replace(options, sources={"train": corpus.files([blank])}, tokenizer="bytes")
    single = replace(single, vocab_size=None)
    with pytest.raises(UserError, match="set --val-fraction 0"):
        prepare.prepare(single)
    prepare.prepare(replace(single, holdout=HoldoutRule(val_fraction=0)))
    assert list(open_data(options.out).splits) == ["train"]


def test_small_dtype_is_refused(options, monkeypatch):
    monkeypatch.setattr(prepare, "dtype_for", lambda size, wanted: _dtype_for(70_000, wanted))
    with pytest.raises(UserError, match="--dtype uint16 holds 65,536 ids"):
        prepare.prepare(replace(options, dtype="uint16"))
    prepare.prepare(options)
    assert open_data(options.out).split("train").read(0, 5).dtype == np.int64
    assert "uint32" in (options.out / "index.json").read_text()


_dtype_for = prepare.dtype_for


def test_existing_output(options):
    prepare.prepare(options)
    before = _contents(options.out)
    with pytest.raises(UserError, match="add --overwrite"):
        prepare.prepare(options)
    assert _contents(options.out) == before
    prepare.prepare(replace(options, overwrite=True, tokenizer="bytes", vocab_size=None))
    assert open_data(options.out).vocab_size == 257
    verify(options.out)
    own = str(options.out / "tokenizer")  # it is read before it is replaced
    prepare.prepare(replace(options, overwrite=True, tokenizer=own, vocab_size=None))
    verify(options.out)
    assert _left(options) == ["out"]


@pytest.mark.parametrize(
    "change",
    [
        {"sources": {"train": corpus.files(["no_such_input"])}},
        {"tokenizer": "no_such_tokenizer"},
        {"vocab_size": 100_000},
        {"holdout": HoldoutRule(val_documents=1000)},
        {"workers": 0},
    ],
)
def test_a_mistake_with_overwrite_costs_nothing(options, change):
    prepare.prepare(options)
    before = _contents(options.out)
    with pytest.raises(UserError):
        prepare.prepare(replace(options, overwrite=True, **change))
    assert _contents(options.out) == before
    assert _left(options) == ["out"]


def test_foreign_files_are_never_touched(options, tmp_path):
    options.out.mkdir()
    (options.out / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other files \(thesis\.txt\)"):
            prepare.prepare(replace(options, overwrite=overwrite))
    assert _contents(options.out) == {"thesis.txt": b"precious"}
    inside = options.sources["train"].paths[0] / "tokens"
    with pytest.raises(UserError, match="lies inside --input"):
        prepare.prepare(replace(options, out=inside))
    with pytest.raises(UserError, match="is not a folder"):
        prepare.prepare(replace(options, out=options.out / "thesis.txt"))


def test_too_little_disk(options, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="are needed for the tokens"):
        prepare.prepare(options)
    assert _left(options) == []
    monkeypatch.undo()
    prepare.prepare(options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="for the tokens beside the data that they replace"):
        prepare.prepare(replace(options, overwrite=True))
    verify(options.out)


def test_a_full_disk_leaves_nothing(options, monkeypatch):
    add = prepare.SplitWriter.add

    def full(self, tokens, **counts):
        add(self, tokens, **counts)
        if self.tokens > 3500:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare.SplitWriter, "add", full)
    with pytest.raises(UserError, match="the disk is full"):
        prepare.prepare(options)
    assert _left(options) == []


def test_errors_of_the_file_system_name_the_path(options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--out .*file/out: .*file is a file, not a folder"):
        prepare.prepare(replace(options, out=tmp_path / "file" / "out"))

    def refused(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/input.txt")

    monkeypatch.setattr(prepare, "_encode", refused)
    with pytest.raises(UserError, match=r"/some/input\.txt: Permission denied"):
        prepare.prepare(options)
    assert _left(options) == ["file"]


def test_input_that_changes_meanwhile(options, monkeypatch):
    encode = prepare._encode
    folder = options.sources["train"].paths[0]

    def late(*args):
        (folder / "late.txt").write_text("one more")
        return encode(*args)

    monkeypatch.setattr(prepare, "_encode", late)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare.prepare(options)
    assert _left(options) == []
