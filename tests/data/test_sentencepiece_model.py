"""The converted fast tokenizer gives the ids of the sentencepiece library itself."""

import io

import pytest
import sentencepiece

from sparse_gpt.data.sentencepiece_model import training_lines
from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import AWKWARD, prose

TEXTS = [prose(seed, 800) for seed in range(20, 30)] + AWKWARD
# Where "<s>" is a control symbol, its text is the documented difference.
NO_SYMBOLS = [text for text in TEXTS if "<s>" not in text]


def _train_library_model(path, **options) -> sentencepiece.SentencePieceProcessor:
    writer = io.BytesIO()
    lines = [line for seed in range(8) for line in prose(seed, 800).split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=writer,
        vocab_size=380 if options.get("byte_fallback") else 150,
        minloglevel=2,
        **options,
    )
    path.write_bytes(writer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
def test_trained_models(kind):
    tokenizer = train_tokenizer(kind, (prose(seed, 800) for seed in range(8)), 420)
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._sentencepiece)
    assert library.vocab_size() == tokenizer.vocab_size
    assert library.eos_id() == tokenizer.eos_id
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text)
    text = prose(50, 500)
    assert len(tokenizer.encode(text)) < len(text) / 2  # it learnt words, not letters


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "normalization_rule_name": "identity"},
        {"byte_fallback": True, "remove_extra_whitespaces": False, "character_coverage": 0.98},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": True, "split_by_whitespace": False, "max_sentencepiece_length": 12},
        {"byte_fallback": True, "user_defined_symbols": ["<sep>"], "add_dummy_prefix": False},
    ],
    ids=["identity", "blanks", "nfkc", "across-words", "user-defined"],
)
def test_models_made_elsewhere(tmp_path, model_type, options):
    path = tmp_path / "tokenizer.model"
    library = _train_library_model(path, model_type=model_type, **options)
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == library.vocab_size()
    plain = [prose(seed, 800).replace("\n", " ") for seed in range(30, 40)]
    for text in [*plain, "two<sep>parts", "  a  b ", "1234 naïve (so)."]:
        assert tokenizer.encode(text) == library.encode(text), text
    tokenizer.save(tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder").sha256 == tokenizer.sha256
    assert (tmp_path / "folder" / "tokenizer.model").read_bytes() == path.read_bytes()
    (tmp_path / "folder" / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path / "folder").sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
def test_names_of_symbols_are_text(kind):
    """Also where the training text had none of their characters."""
    texts = [prose(seed, 800).replace("<", "").replace("0", "") for seed in range(8)]
    tokenizer = train_tokenizer(kind, iter(texts), 420)
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._sentencepiece)
    for text in ["<0x41>", "a <0x0A><0xFF> b", "<unk> of <unk>", "<s>é<0xC3><0xA9>", "<0x4"]:
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("</s>") == [tokenizer.eos_id]  # the one that is a symbol


def test_models_that_cannot_be_used(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(b"this is no model at all")
    with pytest.raises(UserError, match=r"x\.model is not a sentencepiece model"):
        load_tokenizer(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no pieces"):
        load_tokenizer(path)
    _train_library_model(path, model_type="unigram", eos_id=-1)
    with pytest.raises(UserError, match="no end symbol"):
        load_tokenizer(path)
    _train_library_model(path, model_type="char", hard_vocab_limit=False)
    with pytest.raises(UserError, match="only unigram and BPE"):
        load_tokenizer(path)


def test_training_lines_keep_the_text():
    text = "word " * 3000 + "\n" + "z" * 9000 + "\n\nlast"
    lines = list(training_lines(iter([text])))
    assert "".join(lines) == text.replace("\n", "")
    assert max(map(len, lines)) <= 4000


def test_mistral_model(data_dir):
    path = data_dir / "tokenizers" / "mistral-sentencepiece" / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32000, library.eos_id())
    for text in NO_SYMBOLS:
        assert tokenizer.encode(text) == library.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_mistral_model_on_novels(data_dir, novels):
    path = data_dir / "tokenizers" / "mistral-sentencepiece" / "tokenizer.model"
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    for novel in sorted(novels.glob("*.txt"))[:3]:
        text = novel.read_text(encoding="utf-8")[:200_000]
        assert tokenizer.encode(text) == library.encode(text)
