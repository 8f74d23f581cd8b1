"""Sources of documents: files, data-set folders, the standard library."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sparse_gpt.data import corpus
from sparse_gpt.data.corpus import iter_counted, iter_documents
from sparse_gpt.errors import UserError

pytestmark = pytest.mark.filterwarnings(
    # The datasets library's own use of multiprocessing and of its dependencies.
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
)


@pytest.fixture
def mirror(tmp_path):
    """A data-set folder with one configuration and three splits."""
    folder = tmp_path / "org" / "things"
    (folder / "small-v1").mkdir(parents=True)
    for split, n in (("train", 9), ("validation", 3), ("test", 2)):
        table = pyarrow.table({"text": [f"{split} document {i}" for i in range(n)] + [" ", ""]})
        pyarrow.parquet.write_table(table, folder / "small-v1" / f"{split}-00000-of-00001.parquet")
    configs = [
        {
            "config_name": "small-v1",
            "data_files": [
                {"split": split, "path": f"small-v1/{split}-*"}
                for split in ("train", "validation", "test")
            ],
        }
    ]
    card = "---\nconfigs: " + json.dumps(configs) + "\n---\n# Things\n"
    (folder / "README.md").write_text(card)
    return folder


def test_dataset_folder(mirror):
    name = str(mirror)
    assert corpus.dataset_splits(name, "small-v1") == ["train", "validation", "test"]
    source = corpus.dataset(name, config="small-v1", split="validation")
    assert list(iter_documents(source)) == [f"validation document {i}" for i in range(3)]
    assert not source.remote
    assert corpus.dataset("org/elsewhere", split="train").remote
    assert source.describe() == {
        "kind": "dataset",
        "name": "org/things",
        "config": "small-v1",
        "split": "validation",
    }


def test_dataset_that_is_not_there(mirror, tmp_path):
    with pytest.raises(UserError, match=r"\(--config big\) cannot be opened: .*small-v1"):
        corpus.dataset_splits(str(mirror), "big")
    with pytest.raises(UserError, match="--dataset nobody/nothing"):
        corpus.dataset_splits("nobody/nothing", None)
    source = corpus.dataset(str(mirror), config="small-v1", split="dev")
    with pytest.raises(UserError, match="no split 'dev'; it has: train, validation, test"):
        list(iter_documents(source))
    source = corpus.dataset(str(mirror), config="small-v1", split="test", text_field="body")
    with pytest.raises(UserError, match="row 0 has no field 'body'; it has: text"):
        list(iter_documents(source))


def test_rows_over_the_limit(mirror, monkeypatch):
    """Of a data set as of a file: in bytes, and the row is named."""
    table = pyarrow.table({"text": ["short", "漢" * 400]})
    pyarrow.parquet.write_table(table, mirror / "small-v1" / "test-00000-of-00001.parquet")
    source = corpus.dataset(str(mirror), config="small-v1", split="test")
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 1200)
    assert len(list(iter_documents(source))) == 2
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 1199)
    with pytest.raises(UserError, match="split test row 1 is a document of more than 1,199 bytes"):
        list(iter_documents(source))


def test_dataset_code_is_refused_and_never_run(mirror, tmp_path):
    witness = tmp_path / "ran"
    (mirror / "things.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="holds Python code"):
        corpus.dataset_splits(str(mirror), "small-v1")
    assert not witness.exists()


def test_files_skip_blank_documents_and_count_words(tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree")
    (tmp_path / "b.txt").write_text(" \n\t\n")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n{"text": ""}\n')
    found = list(iter_counted(corpus.files([tmp_path])))
    assert found == [("one two\n\nthree", 3), ("four", 1)]


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 7, 12, 13, 1000])
def test_max_bytes(tmp_path, limit):
    (tmp_path / "a.txt").write_text("aé漢")  # 1 + 2 + 3 bytes
    (tmp_path / "b.txt").write_text("second")
    texts = list(iter_documents(corpus.files([tmp_path], max_bytes=limit)))
    joined = "".join(texts)
    assert "aé漢second".startswith(joined)
    assert len(joined.encode()) <= limit
    assert len(joined.encode()) > min(limit, 12) - 3


def test_wikitext_options(tmp_path):
    lines = [
        " \n",
        " = A = \n",
        " \n",
        " It 's 1 @,@ 000 . \n",
        " \n",
        " = B = \n",
        " \n",
        " b . \n",
    ]
    (tmp_path / "wiki.txt").write_text("".join(lines))
    raw = list(iter_counted(corpus.files([tmp_path], wikitext="raw")))
    plain = list(iter_counted(corpus.files([tmp_path], wikitext="detokenised")))
    assert "".join(document.text for document in raw) == "".join(lines)
    assert [document.text for document in plain] == [
        "\n= A =\n\nIt's 1,000.\n",
        "\n= B =\n\nb.\n",
    ]
    # Word-level figures are per word of the source, also where the text was changed.
    assert [document.words for document in plain] == [document.words for document in raw] == [9, 5]


def test_wikitext_mirror(hub):
    name = str(hub / "Salesforce" / "wikitext")
    source = corpus.dataset(name, config="wikitext-103-v1", split="test")
    documents = list(iter_counted(source))
    assert source.wikitext == "raw"
    assert len(documents) == 60
    assert sum(document.words for document in documents) == 241_211


def test_standard_library():
    texts = list(iter_documents(corpus.standard_library(300_000)))
    size = sum(len(text.encode()) for text in texts)
    assert 50_000 < size <= 300_000
    assert texts == list(iter_documents(corpus.standard_library(300_000)))
    assert any("def " in text and "\n    " in text for text in texts)
    everything = list(iter_documents(corpus.standard_library()))
    assert everything[: len(texts)] == texts
    assert 5_000_000 < sum(len(text.encode()) for text in everything) <= corpus.STDLIB_BYTES


def test_standard_library_has_no_tests(tmp_path, monkeypatch):
    for name in ("a.py", "test/b.py", "x/tests/c.py", "site-packages/d.py", "x/y.py", "z.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(iter_documents(corpus.standard_library())) == ["# a.py\n", "# x/y.py\n"]
