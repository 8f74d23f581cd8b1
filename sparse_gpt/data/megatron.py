"""Reader for data tokenised for Megatron-LM or GPT-NeoX: a `.bin/.idx` pair, as it is.

The index: magic "MMIDIDX\\0\\0", version (u64, 1), dtype code (u8), number of sequences (u64),
number of document boundaries (u64), sequence lengths (i32 each, tokens), byte offsets (i64
each), document boundaries (i64 each: the sequence where each document starts, then the end).

Such a pair knows no tokenizer and no splits. Both vocabulary and end token come from the folder
of the tokenizer that made it, where that is given. Otherwise the end token is taken as the last
token of the first document, and the vocabulary, unless given, as the largest id + 1. Splits:
the LAST documents are the validation split, at least one of them, as many as reach val_fraction
of all tokens; the rest is the training split.
"""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparse_gpt.data.number_file import NumberFile
from sparse_gpt.data.shard_index import MAX_VOCABULARY
from sparse_gpt.data.shards import TokenData, TokenSplit
from sparse_gpt.data.tokenizer import Tokenizer, load_tokenizer
from sparse_gpt.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 8
_CHUNK = 1 << 22
# Codes of the format; only integers can be tokens (6 and 7 are floating point).
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class _Header(NamedTuple):
    dtype: np.dtype
    sequences: int
    boundaries: int


def is_megatron(prefix: str | Path) -> bool:
    """Whether `<prefix>.bin` and `<prefix>.idx` both exist."""
    return all(Path(f"{prefix}{end}").is_file() for end in (".bin", ".idx"))


def open_megatron(
    prefix: str | Path,
    *,
    val_fraction: float = 0.01,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
) -> TokenData:
    """Open a pair by its prefix (such as `corpus_text_document`).

    val_fraction: share of the tokens to hold out, 0 for no validation split. tokenizer: folder
    with the tokenizer.json of the one that made the tokens. vocab_size: of the model, so with a
    tokenizer it may only be as large as its vocabulary or larger (padded). With neither, a pass
    over all the tokens finds the largest id, at every opening; two corpora of one tokenizer then
    seldom agree. Ids outside the vocabulary (the tokenizer's, if given) are refused when they are
    read. Every count is checked against the sizes of the files before it is used. identity covers
    the index, the size of the tokens and the split, not each token and not the tokenizer.
    Raises UserError for anything that does not fit.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}, it must be at least 0 and less than 1")
    index, content = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    raw = NumberFile(index, "u1")
    header = _read_header(raw)
    tokens = _open_tokens(content, header)
    starts = _document_starts(raw, content, header, len(tokens))
    known = None if tokenizer is None else _load_tokenizer(Path(tokenizer))
    if known is not None:
        id_limit, eos_id = known.vocab_size, known.eos_id
    else:
        id_limit = _largest(tokens) + 1 if vocab_size is None else vocab_size
        end = int(starts[1])
        eos_id = int(tokens[end - 1 : end][0])
    if vocab_size is not None and vocab_size < id_limit:
        raise UserError(
            f"data path {prefix}: vocab_size {vocab_size} is smaller than the {id_limit} tokens of "
            f"tokenizer {tokenizer}; drop vocab_size or make it at least that"
        )
    if max(id_limit, vocab_size or 0) > MAX_VOCABULARY:
        raise UserError(
            f"data path {prefix}: a vocabulary of {max(id_limit, vocab_size or 0):,} tokens; at "
            f"most {MAX_VOCABULARY:,} can be trained: the file is damaged, or vocab_size is wrong"
        )
    where = str(prefix)
    splits = {}
    documents = len(starts) - 1
    cut = documents
    if val_fraction > 0:
        if documents < 2:
            raise UserError(
                f"data path {prefix} is one document; none can be held out: set val_fraction 0"
            )
        border = np.uint64(len(tokens) - math.ceil(val_fraction * len(tokens)))
        cut = int(np.searchsorted(starts, border, side="right")) - 1
        cut = min(max(cut, 1), documents - 1)
    ranges = {"train": (0, cut)} | ({"val": (cut, documents)} if cut < documents else {})
    for name, (low, high) in ranges.items():
        begin, end = int(starts[low]), int(starts[high])
        splits[name] = TokenSplit(
            f"{where} split {name!r}",
            [tokens.part(header.dtype, begin * header.dtype.itemsize, end - begin)],
            starts[low : high + 1] - starts[low],
            id_limit,
        )
    return TokenData(
        path=Path(prefix),
        vocab_size=id_limit if vocab_size is None else vocab_size,
        eos_id=eos_id,
        tokenizer_sha256=None if known is None else known.sha256,
        tokenizer_path=None if tokenizer is None else Path(tokenizer),
        splits=splits,
        identity=_identity(raw, len(tokens) * header.dtype.itemsize, cut),
    )


def _load_tokenizer(folder: Path) -> Tokenizer:
    # The run copies it for exports, which need the Hugging Face form.
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"data tokenizer {folder} is not a folder with a tokenizer.json; give the folder of "
            "the tokenizer that made the tokens, in Hugging Face form"
        )
    return load_tokenizer(folder)


def _read_header(file: NumberFile) -> _Header:
    index, size, raw = file.path, len(file), file[:_HEADER].tobytes()
    if len(raw) < _HEADER or not raw.startswith(_MAGIC):
        raise UserError(f"{index} is not a Megatron index (its first bytes are not MMIDIDX)")
    at = len(_MAGIC)
    version = int.from_bytes(raw[at : at + 8], "little")
    code = raw[at + 8]
    sequences = int.from_bytes(raw[at + 9 : at + 17], "little")
    boundaries = int.from_bytes(raw[at + 17 : at + 25], "little")
    if version != 1:
        raise UserError(f"{index} has version {version}; version 1 is supported")
    if code not in _DTYPES:
        raise UserError(
            f"{index} has dtype code {code}; the integer codes {sorted(_DTYPES)} are supported"
        )
    # Checked before anything is allocated: the counts may be anything in a damaged file. Newer
    # files may end in one byte (mode) for every sequence.
    needed = _HEADER + 12 * sequences + 8 * boundaries
    if size not in (needed, needed + sequences):
        raise UserError(
            f"{index} has {size} bytes, but {sequences} sequences and {boundaries} document "
            f"boundaries need {needed}; it is damaged"
        )
    if sequences < 1 or boundaries < 2:
        raise UserError(f"{index} holds no documents")
    return _Header(np.dtype(_DTYPES[code]), sequences, boundaries)


def _open_tokens(content: Path, header: _Header) -> NumberFile:
    size = len(file := NumberFile(content, "u1"))
    if size == 0 or size % header.dtype.itemsize:
        raise UserError(
            f"{content} has {size} bytes, which is no number of {header.dtype.itemsize}-byte tokens"
        )
    return file.part(header.dtype, 0, size // header.dtype.itemsize)


def _document_starts(raw: NumberFile, content: Path, header: _Header, n_tokens: int) -> np.ndarray:
    """Token offsets of the documents (uint64 [documents + 1]), empty documents left out."""
    index, n = raw.path, header.sequences
    sizes = raw.part("<i4", _HEADER, n)
    pointers = raw.part("<i8", _HEADER + 4 * n, n)
    boundaries = raw.part("<i8", _HEADER + 12 * n, header.boundaries)[:]
    if int(boundaries[0]) != 0 or int(boundaries[-1]) != n:
        raise UserError(
            f"{index}: document boundaries run from {boundaries[0]} to {boundaries[-1]}, the "
            f"sequences from 0 to {n}"
        )
    if (boundaries[1:] < boundaries[:-1]).any():
        raise UserError(f"{index}: document boundaries fall")
    # Documents are runs of sequences, and sequences must lie end to end for a document to be
    # one run of tokens, as every writer of the format leaves them.
    expected = 0
    starts = np.full(len(boundaries), n_tokens, np.uint64)  # of empty ones after the last sequence
    for at in range(0, n, _CHUNK):
        lengths = sizes[at : at + _CHUNK].astype(np.int64)
        if (lengths < 0).any():
            raise UserError(f"{index}: sequence {at + int(np.argmax(lengths < 0))} is negative")
        ends = expected + np.cumsum(lengths)
        begins = ends - lengths
        differs = pointers[at : at + _CHUNK] != begins * header.dtype.itemsize
        if differs.any():
            raise UserError(
                f"{index}: sequence {at + int(np.argmax(differs))} does not follow the one before"
            )
        low, high = np.searchsorted(boundaries, [at, at + len(lengths)])
        starts[low:high] = begins[boundaries[low:high] - at]
        expected = int(ends[-1])
    if expected != n_tokens:
        raise UserError(
            f"{content} holds {n_tokens} tokens, but the lengths of its index add up to {expected}"
        )
    return np.unique(starts)


def _largest(tokens: NumberFile) -> int:
    largest = 0
    for at in range(0, len(tokens), _CHUNK):
        piece = tokens[at : at + _CHUNK]
        if piece.min() < 0:
            raise UserError(f"{tokens.path}: token {at + int(np.argmax(piece < 0))} is negative")
        largest = max(largest, int(piece.max()))
    return largest


def _identity(raw: NumberFile, size: int, cut: int) -> str:
    digest = hashlib.sha256(f"megatron {size} {cut} ".encode())
    for at in range(0, len(raw), _CHUNK):
        digest.update(raw[at : at + _CHUNK].data)
    return digest.hexdigest()
