"""Sentencepiece models: training without loss of white space, and conversion to tokenizer.json.

The converted fast tokenizer gives the ids of the sentencepiece library, except:
- the literal text of a control symbol ("</s>") is read as that symbol, not as plain text;
- in a unigram model trained elsewhere that lacks one of the characters of "<unk>" or "<0x41>",
  these literal texts may be read as the unknown symbol or that byte;
- where two segmentations score exactly alike the two libraries may choose differently;
- U+2581 in a text becomes a blank, as in sentencepiece itself.
"""

import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from sparse_gpt.errors import UserError

BLANK = "\u2581"
# One word with the blanks before it: no piece of a model trained with split_by_whitespace
# crosses these borders, so cutting there changes no id and lets the word cache work.
WORD_PATTERN = f"{BLANK}*[^{BLANK}]+|{BLANK}+"
# Training depends on the number of threads (floating-point sums), so it is fixed, not the
# machine's.
_TRAINING_THREADS = 8
_MAX_LINE = 4000
# The fast unigram model finds every piece in a text, also the names "<unk>" and "<0x41>". Their
# score is so low that single characters win, as long as each character of these names is known.
_NAME_CHARACTERS = "<>x0123456789ABCDEFunk"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
LONGEST_PIECE = 1_000  # characters; the trainer makes them of 16, and no option gives hundreds


def training_lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines of at most about 4,000 characters: the trainer drops longer ones and stops at NUL."""
    for text in texts:
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _MAX_LINE:
                cut = line.find(" ", start + _MAX_LINE // 2, start + _MAX_LINE)
                cut = start + _MAX_LINE if cut < 0 else cut
                yield line[start:cut]
                start = cut
            if start < len(line) and "\0" not in line:
                yield line[start:]


def train_sentencepiece(texts: Iterator[str], model_type: str, vocab_size: int, seed: int) -> bytes:
    """Train a model ("unigram" or "bpe") with byte fallback; returns the serialised model.

    Identity normalisation, no dummy prefix and white space kept, so that decoding is exact;
    line ends are byte tokens. The result is the same on every machine.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed % 2**32)
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(texts),
            model_writer=writer,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
            max_sentence_length=16 * _MAX_LINE,
            required_chars=_NAME_CHARACTERS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit is not None:
            raise UserError(
                f"--vocab-size {vocab_size}: the text supports at most {limit[1]} sentencepiece "
                "tokens; lower --vocab-size or give more text"
            ) from error
        raise UserError(f"--vocab-size {vocab_size}: sentencepiece training: {error}") from error
    return writer.getvalue()


def convert_sentencepiece(content: bytes, where: str) -> tuple[dict[str, Any], str]:
    """(content of tokenizer.json, end token) for a serialised model; `where` is for errors."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise UserError(f"tokenizer: {where} is not a sentencepiece model ({error})") from error
    try:
        pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer: {where}: a piece is not text ({error})") from error
    if not pieces:
        raise UserError(f"tokenizer: {where} is not a sentencepiece model (it has no pieces)")
    _check_pieces(pieces, where)
    eos = proto.trainer_spec.eos_piece
    if (eos, _CONTROL) not in {(piece, kind) for piece, _, kind in pieces}:
        raise UserError(f"tokenizer: {where} has no end symbol {eos!r}; a document needs one")
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise UserError(f"tokenizer: {where} has no unknown symbol")

    backend = Backend(_model(proto.trainer_spec, pieces, unknown, where))
    backend.normalizer = _normalizer(proto.normalizer_spec, where)  # pyright: ignore[reportAttributeAccessIssue]
    crossing = any(
        BLANK in piece.lstrip(BLANK)
        for piece, _, kind in pieces
        if kind in (_NORMAL, _USER_DEFINED)
    )
    if not crossing:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    # Not the unknown symbol: "<unk>" written in a text (as in WikiText) is text.
    controls = [piece for piece, _, kind in pieces if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in controls])
    own = [piece.replace(BLANK, " ") for piece, _, kind in pieces if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(p, special=False, normalized=False) for p in own])
    return json.loads(backend.to_str()), eos


def _check_pieces(pieces: list[tuple[str, float, int]], where: str) -> None:
    """Refuse what no trainer writes, and what would take time or memory without end."""
    seen: set[str] = set()
    for number, (piece, score, _) in enumerate(pieces):
        if len(piece) > LONGEST_PIECE:
            raise UserError(
                f"tokenizer: {where}: piece {number} has {len(piece):,} characters; at most "
                f"{LONGEST_PIECE:,} are read"
            )
        if not math.isfinite(score):
            raise UserError(f"tokenizer: {where}: the score of piece {number} is {score}")
        if piece in seen or not piece:
            raise UserError(f"tokenizer: {where}: piece {number}, {piece!r}, is empty or a second")
        seen.add(piece)


def _model(spec: Any, pieces: list[tuple[str, float, int]], unknown: int, where: str) -> Any:
    if spec.model_type == _UNIGRAM:
        vocab = [(piece, score) for piece, score, _ in pieces]
        # Only normal pieces may be found in a text; see _NAME_CHARACTERS.
        lowest = min(score for _, score, _ in pieces) - 1000.0
        vocab = [
            (piece, score if kind in (_NORMAL, _USER_DEFINED) else lowest)
            for (piece, score), (_, _, kind) in zip(vocab, pieces)
        ]
        return models.Unigram(vocab, unk_id=unknown, byte_fallback=spec.byte_fallback)
    if spec.model_type == _BPE:
        return models.BPE(
            vocab={piece: i for i, (piece, _, _) in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    raise UserError(f"tokenizer: {where}: only unigram and BPE sentencepiece models can be used")


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
    ranked = []
    for whole, i in ids.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[i][1], i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(spec: Any, where: str) -> Any:
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(BLANK))
    if not spec.escape_whitespaces:
        raise UserError(f"tokenizer: {where}: models without escaped white space are not supported")
    steps.append(normalizers.Replace(" ", BLANK))
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
