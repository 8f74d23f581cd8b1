"""The data of an experiment is prepared where it is not there, and not twice."""

from pathlib import Path

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.spec import load_experiment
from tests.experiment.tiny import write_experiment
from tests.tiny import document

BYTES = 257  # of the byte tokenizer, with its end token


def corpora(folder: Path, **changes) -> Corpora:
    text = {"input": "$BOOKS", "tokenizer": "bytes", "val_documents": 2, "test_documents": 3}
    data = {
        "text": {**text, **changes},
        "more": {"input": "$BOOKS", "tokenizer_of": "text", "vocab_size": BYTES},
    }
    path = write_experiment(folder, data=data, base={"data": [{"path": "text"}]})
    return Corpora(load_experiment(path), folder / "work")


@pytest.fixture(autouse=True)
def books(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(document(number))
    monkeypatch.setenv("BOOKS", str(folder))
    return folder


def test_made_once_and_again_where_the_settings_are_others(tmp_path):
    first = corpora(tmp_path)
    assert first.opened("text") is None
    data = first.prepare("text", workers=1)
    assert {name: split.n_documents for name, split in data.splits.items()} == {
        "train": 7,
        "val": 2,
        "test": 3,
    }
    index = tmp_path / "work/data/text/index.json"
    made = index.stat().st_mtime_ns
    assert corpora(tmp_path).prepare("text", workers=1).identity == data.identity
    assert index.stat().st_mtime_ns == made
    other = corpora(tmp_path, val_documents=1)
    assert other.opened("text") is None
    assert other.prepare("text", workers=1).splits["val"].n_documents == 1
    assert first.opened("text") is None  # those of the first have gone


def test_with_the_tokenizer_of_another_corpus(tmp_path):
    made = corpora(tmp_path)
    more = made.prepare("more", workers=1)
    text = made.opened("text")  # made on the way
    assert text is not None and more.tokenizer_sha256 == text.tokenizer_sha256
    # Another tokenizer there is another corpus here.
    other = corpora(tmp_path, max_bytes=1000)
    assert other.settings_sha256("more") != made.settings_sha256("more")


def test_a_vocabulary_that_is_not_what_was_said(tmp_path):
    experiment = corpora(tmp_path).experiment
    wrong = experiment.data["more"].model_copy(update={"vocab_size": 300})
    data = {**experiment.data, "more": wrong}
    made = Corpora(experiment.model_copy(update={"data": data}), tmp_path / "work")
    assert made.vocab_size("more") == 300  # until the data is there
    with pytest.raises(UserError, match=r"data.more.vocab_size: 300, but the data at .* has 257"):
        made.prepare("more", workers=1)


def test_a_prepared_folder_that_is_not_there(tmp_path):
    data = {"text": {"path": str(tmp_path / "nothing"), "vocab_size": BYTES}}
    made = Corpora(load_experiment(write_experiment(tmp_path, data=data)), tmp_path / "work")
    with pytest.raises(UserError, match=r"data.text.path: nothing at .*; prepare it"):
        made.prepare("text", workers=1)


def test_other_texts_are_another_corpus(tmp_path, books, monkeypatch):
    made = corpora(tmp_path)
    before = made.prepare("text", workers=1)
    more = made.prepare("more", workers=1)
    # The same texts at another place, or none to be found: as it was made.
    assert made.opened("text") is not None and made.opened("more") is not None
    monkeypatch.delenv("BOOKS")
    assert made.opened("text") is not None
    monkeypatch.setenv("BOOKS", str(books))
    (books / "3.txt").write_text(document(3) + " and more")
    assert made.opened("text") is None and made.opened("more") is None
    after = made.prepare("text", workers=1)
    assert after.identity != before.identity
    assert made.prepare("more", workers=1).identity != more.identity
    (books / "20.txt").write_text(document(20))
    assert made.opened("text") is None
