"""Every tokenizer is lossless, and the stock AutoTokenizer gives its ids."""

import json
import pickle
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    copy_tokenizer,
    folder_sha256,
    load_tokenizer,
)
from sparse_gpt.data.tokenizer_training import KINDS, train_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import AWKWARD, prose

VOCAB = {"bytes": None, "bpe": 400, "sentencepiece": 400, "sentencepiece-bpe": 400}
TEXTS = [prose(seed, 600) for seed in range(8)] + AWKWARD


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, iter(TEXTS), VOCAB[kind]) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_awkward_texts(trained, kind):
    tokenizer = trained[kind]
    for text in [*AWKWARD, prose(99, 500)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids


# U+2581 is sentencepiece's own blank: the one character it cannot keep.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_round_trip_of_any_text(trained, text):
    for tokenizer in trained.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab .,\n\t1é漢'\u2581"), max_size=200), size=st.integers(1, 40))
def test_parts_change_no_id(trained, text, size):
    for kind, tokenizer in trained.items():
        parts = list(tokenizer.parts(text, size))
        assert "".join(parts) == text
        joined = [i for part in parts for i in tokenizer.encode(part)]
        assert joined == tokenizer.encode(text), kind


def test_long_documents_are_really_cut(trained):
    text = prose(5, 3000)
    for tokenizer in trained.values():
        parts = list(tokenizer.parts(text, 500))
        assert len(parts) > 10 and max(map(len, parts)) < 1000
        assert [i for p in parts for i in tokenizer.encode(p)] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_the_same_ids(trained, kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = trained[kind]
    tokenizer.save(tmp_path)
    # As beside an exported model: its config must not change the class of the tokenizer.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.eos_token_id == tokenizer.eos_id
    assert len(stock) == tokenizer.vocab_size
    for text in [*AWKWARD, *TEXTS, f"in the{END_OF_TEXT} middle </s>x"]:
        ids = tokenizer.encode(text)
        assert stock(text)["input_ids"] == ids
        assert stock.decode(ids) == text == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_keeps_identity(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert (loaded.sha256, loaded.vocab_size, loaded.eos_id) == (
        tokenizer.sha256,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    assert folder_sha256(tmp_path / "a") == tokenizer.sha256
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(tmp_path / "b").sha256 == tokenizer.sha256
    assert pickle.loads(pickle.dumps(tokenizer)).sha256 == tokenizer.sha256  # noqa: S301 - our own
    assert tokenizer.encode_batch(TEXTS) == [loaded.encode(text) for text in TEXTS]
    spec = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(spec))  # formatting only
    assert load_tokenizer(tmp_path / "b").sha256 == tokenizer.sha256
    assert folder_sha256(tmp_path / "b") == tokenizer.sha256


def test_a_copy_is_canonical(trained, tmp_path):
    """Of a folder from elsewhere, only what gives the shards' ids: no added tokens, no weights."""
    from transformers import AutoTokenizer

    tokenizer = trained["bytes"]
    tokenizer.save(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [256], "tokens": [END_OF_TEXT]}},
    }
    path.write_text(json.dumps(spec))
    (tmp_path / "a" / "model.safetensors").write_text("large")
    assert folder_sha256(tmp_path / "a") == tokenizer.sha256
    copy_tokenizer(tmp_path / "a", tmp_path / "b")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names
    stock = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert stock("abcdef")["input_ids"] == list(b"abcdef")
    with pytest.raises(UserError, match=r"there is no tokenizer\.json in"):
        copy_tokenizer(tmp_path, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_hashes_tell_tokenizers_apart(trained):
    assert len({tokenizer.sha256 for tokenizer in trained.values()}) == len(trained)


def test_bytes_are_byte_values():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    text = "aé漢\n\0"
    assert tokenizer.encode(text) == list(text.encode())


def test_sizes_and_determinism(trained):
    for kind, size in VOCAB.items():
        if size is not None:
            assert trained[kind].vocab_size == size
            assert train_tokenizer(kind, iter(TEXTS), size).sha256 == trained[kind].sha256


def test_tokens_added_by_default_are_stripped(trained, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    trained["bpe"].save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    backend.enable_truncation(5)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = prose(3, 100)
    assert load_tokenizer(tmp_path).encode(text) == trained["bpe"].encode(text)


def _gpt2_files(folder, trained) -> None:
    spec = trained["bpe"]._spec
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    lines = [" ".join(pair) for pair in spec["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))


def test_gpt2_files(trained, tmp_path):
    _gpt2_files(tmp_path, trained)
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == trained["bpe"].eos_id
    for text in TEXTS:
        assert loaded.encode(text) == trained["bpe"].encode(text)


def test_bad_folders_are_refused_by_name(trained, tmp_path):
    with pytest.raises(UserError, match="neither a folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    _gpt2_files(gpt2, trained)
    with open(gpt2 / "merges.txt", "a") as file:
        file.write("one two three\n")
    with pytest.raises(UserError, match=r"merges.txt line \d+ is not a pair"):
        load_tokenizer(gpt2)
    folder = tmp_path / "hf"
    trained["bpe"].save(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.move(folder / name, tmp_path / name)
    with pytest.raises(UserError, match="names no end token"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(UserError, match="'<none>' is not in its vocabulary"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


def test_real_gpt2(data_dir, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(data_dir / "tokenizers" / "gpt2")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    tokenizer.save(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert stock(text)["input_ids"] == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
