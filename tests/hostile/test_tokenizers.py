"""Tokenizers that are broken, boundless or ask for more than themselves."""

import json
import random
import struct

import pytest

from sparse_gpt.data.shards import open_data
from sparse_gpt.data.tokenizer import LARGEST_FILE, byte_tokenizer, load_tokenizer
from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from sparse_gpt.hf.stock import stock_tokenizer
from tests.data.fixtures import make_folder, prose
from tests.hostile.folders import edit_json


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save(tmp_path)
    return tmp_path


def _model(spec):
    return spec["model"]


SPECS = {
    "id 2^31": lambda s: _model(s)["vocab"].update(a=2**31),
    "id 2^32": lambda s: _model(s)["vocab"].update(a=2**32),
    "id 2^64": lambda s: _model(s)["vocab"].update(a=2**64),
    "id -1": lambda s: _model(s)["vocab"].update(a=-1),
    "id 1.5": lambda s: _model(s)["vocab"].update(a=1.5),
    "vocabulary of text": lambda s: _model(s).update(vocab="abc"),
    "merges of nothing": lambda s: _model(s).update(merges=["x y"]),
    "merges of numbers": lambda s: _model(s).update(merges=[[1, 2]]),
    "added nothing": lambda s: s.update(added_tokens=[3]),
    "added half": lambda s: s.update(added_tokens=[{"id": 1}]),
    "processor": lambda s: s.update(post_processor=[1]),
    "processors": lambda s: s.update(post_processor={"type": "Sequence", "processors": 3}),
    "processors of text": lambda s: s.update(
        post_processor={"type": "Sequence", "processors": ["a"]}
    ),
    "pattern": lambda s: s.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                       "invert": False}
    ),
    "kind": lambda s: s.update(pre_tokenizer={"type": "os.system"}),
    "remote": lambda s: s.update(model={"type": "https://example.org/tokenizer.json"}),
    "model elsewhere": lambda s: s.update(model="../../model.json"),
    "charsmap": lambda s: s.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "no model": lambda s: s.pop("model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPECS)
def test_tokenizer_files(folder, refused, kind):
    edit_json(folder / "tokenizer.json", SPECS[kind])
    with refused(folder / "tokenizer.json", mb=8):
        load_tokenizer(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\xff", '{"model": 1e999}'])
def test_tokenizer_files_that_are_none(folder, refused, text):
    (folder / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with refused(folder, mb=8):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["processor", "processors", "processors of text"])
def test_prepared_data_with_a_broken_tokenizer(tmp_path, refused, kind):
    data = make_folder(tmp_path / "data", {"train": [[1, 2, 3]]})
    path = edit_json(data / "tokenizer" / "tokenizer.json", SPECS[kind])
    with refused(path):
        open_data(data)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_enormous_files(tmp_path, refused, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**40)
    with refused(tmp_path / name, f"more than the {LARGEST_FILE:,}", mb=1):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("end", [3, ["</s>"], {"content": 3}, "x" * 5000, None])
def test_end_tokens(folder, refused, end):
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    with refused("tokenizer:", folder):
        load_tokenizer(folder)


GPT2 = {
    "merges are no text": ("{}", b"\xff\xfe"),
    "merges of three": ('{"<|endoftext|>": 0}', b"a b c"),
    "vocabulary of text": ('{"<|endoftext|>": "0"}', b""),
    "id 2^40": ('{"<|endoftext|>": 1099511627776}', b""),
    "id far away": ('{"<|endoftext|>": 4000000000}', b""),
    "merges of nothing": ('{"<|endoftext|>": 0}', b"a b"),
    "no end": ('{"a": 0}', b""),
}


@pytest.mark.parametrize("kind", GPT2)
def test_gpt2_files(tmp_path, refused, kind):
    vocabulary, merges = GPT2[kind]
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_bytes(merges)
    with refused(tmp_path):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def trained() -> bytes:
    content = train_tokenizer("sentencepiece-bpe", iter([prose(1, 2000)]), 350)._sentencepiece
    assert content is not None
    return content


def test_truncated_models(tmp_path, trained, refused):
    """At any byte: refused, or, cut between two pieces, the model of the first ones."""
    path = tmp_path / "x.model"
    path.write_bytes(trained)
    assert load_tokenizer(path).vocab_size == 350
    cuts, whole = [*range(40), *range(40, len(trained), 53)], 0
    for cut in cuts:
        path.write_bytes(trained[:cut])
        whole += _promises(path)
    assert whole < len(cuts) / 4
    path.write_bytes(trained[: trained.index(b"</s>") - 3])
    with refused(path):
        load_tokenizer(path)


def test_random_bytes_and_flipped_ones(tmp_path, trained):
    """Refused by name, or a tokenizer that keeps its promises."""
    rng = random.Random(0)
    path = tmp_path / "x.model"
    for number in range(300):
        content = bytearray(rng.randbytes(rng.randrange(200)) if number % 3 == 0 else trained)
        for _ in range(rng.choice([0, 1, 1, 5]) if content else 0):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        _promises(path)


def _promises(path) -> bool:
    """Whether a tokenizer is read, which then keeps its promises; else it is refused by name."""
    try:
        tokenizer, said = load_tokenizer(path), str(path)
    except UserError as error:
        tokenizer, said = None, str(error)
    assert str(path) in said
    if tokenizer is not None:
        assert 0 <= tokenizer.eos_id < tokenizer.vocab_size <= 2 * 350 + 65_536
    return tokenizer is not None


@pytest.mark.parametrize("id_", [10**9, 257, 0, 2**32 - 1])
def test_added_tokens_do_not_widen_a_vocabulary(folder, id_):
    path = edit_json(folder / "tokenizer.json", lambda s: s["added_tokens"][0].update(id=id_))
    _promises(path.parent)


def _field(number: int, content: bytes, length: int | None = None) -> bytes:
    """A length-delimited field of a protobuf; `length` may lie."""
    value = len(content) if length is None else length
    out = bytearray([number << 3 | 2])
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value]) + content


def _piece(text: bytes, score: float = -1.0, kind: int = 1) -> bytes:
    return _field(1, _field(1, text) + b"\x15" + struct.pack("<f", score) + bytes([24, kind]))


WHOLE = _piece(b"<unk>", 0.0, 2) + _piece(b"</s>", 0.0, 3) + _piece(b"a") + _piece(b"b")
MODELS = {
    "length 2^31": _field(1, b"abc", 2**31 - 1),
    "length 2^62": _field(1, b"abc", 2**62),
    "inner length": _field(1, _field(1, b"abc", 2**31 - 1)),
    "no text": WHOLE + _piece(b"\xff\xfe"),
    "no unknown": _piece(b"</s>", 0.0, 3) + _piece(b"a"),
    "no end": _piece(b"<unk>", 0.0, 2) + _piece(b"a"),
    "a long piece": WHOLE + _piece(b"ab" * 1_000_000),
    "twice": WHOLE + _piece(b"a"),
    "empty": WHOLE + _piece(b""),
    "nan": WHOLE + _piece(b"c", float("nan")),
    "infinite": WHOLE + _piece(b"c", float("inf")),
    "kind of model": WHOLE + _field(2, bytes([24, 4])),
    "charsmap": WHOLE + _field(3, _field(2, b"\x00" * 3)),
    "charsmap of a size": WHOLE + _field(3, _field(2, b"\xff\xff\xff\x7f" + b"\0" * 20)),
    "nested": b"\x0b" * 100_000,
}


@pytest.mark.parametrize("kind", MODELS)
def test_protobufs(tmp_path, refused, kind):
    path = tmp_path / "x.model"
    path.write_bytes(MODELS[kind])
    with refused(path, mb=40):
        load_tokenizer(path)


def test_a_protobuf_of_this_form_is_read(tmp_path):
    (tmp_path / "x.model").write_bytes(WHOLE)
    assert load_tokenizer(tmp_path / "x.model").vocab_size == 4


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["who/what--evil.T", None]}}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}),
        ("config.json", {"attn_implementation": "who/kernel"}),
        ("config.json", {"_attn_implementation": "who/kernel:forward"}),
    ],
)
def test_what_asks_for_code(folder, marker, refused, name, settings):
    """`transformers` would ask on the terminal whether to run it, or fetch it."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / name).write_text(json.dumps(settings))
    with refused(folder / name):
        stock_tokenizer(folder)


def test_a_class_of_nowhere_is_not_looked_for(folder):
    """A name, not code: the fast tokenizer in tokenizer.json is what is read."""
    settings = {"tokenizer_class": "EvilTokenizer", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).vocab_size == 257
