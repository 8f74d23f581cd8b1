"""Training a tokenizer on a stream of texts."""

import json
from collections.abc import Iterator

from sparse_gpt.data.sentencepiece_model import convert_sentencepiece, train_sentencepiece
from sparse_gpt.data.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer
from sparse_gpt.errors import UserError

KINDS = ("sentencepiece", "sentencepiece-bpe", "bpe", "bytes")
_SMALLEST = {"sentencepiece": 300, "sentencepiece-bpe": 300, "bpe": 257}


def train_tokenizer(
    kind: str, texts: Iterator[str], vocab_size: int | None = None, *, seed: int = 0
) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens.

    kind: "sentencepiece" (unigram) or "sentencepiece-bpe", both with byte fallback; "bpe"
    (byte-level, as GPT-2's); "bytes" (no training, 257 tokens, vocab_size None or 257).
    All are lossless: decode(encode(x)) == x (sentencepiece: but for U+2581, its own blank).
    Raises UserError where the text cannot support the vocabulary asked for.
    """
    if kind == "bytes":
        if vocab_size not in (None, 257):
            raise UserError("--vocab-size: the bytes tokenizer always has 257 tokens")
        return byte_tokenizer()
    if kind not in _SMALLEST:
        raise UserError(f"tokenizer kind {kind!r} is none of {', '.join(KINDS)}")
    if vocab_size is None:
        raise UserError(f"--vocab-size is needed to train a {kind} tokenizer")
    if vocab_size < _SMALLEST[kind]:
        raise UserError(f"--vocab-size {vocab_size}: {kind} needs at least {_SMALLEST[kind]}")
    if kind == "bpe":
        return _train_bpe(texts, vocab_size)
    model_type = "unigram" if kind == "sentencepiece" else "bpe"
    content = train_sentencepiece(texts, model_type, vocab_size, seed)
    spec, eos = convert_sentencepiece(content, "the trained model")
    return Tokenizer(spec, eos, content)


def _train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(json.loads(backend.to_str()), END_OF_TEXT)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the text supports only {tokenizer.vocab_size} byte-level "
            "BPE tokens; lower --vocab-size or give more text"
        )
    return tokenizer
