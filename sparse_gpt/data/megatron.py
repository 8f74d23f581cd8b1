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
    header = _read_header(index)
    tokens = _map_tokens(content, header)
    starts = _document_starts(index, content, header, len(tokens))
    known = None if tokenizer is None else _load_tokenizer(Path(tokenizer))
    if known is not None:
        id_limit, eos_id = known.vocab_size, known.eos_id
    else:
        id_limit = _largest(content, tokens) + 1 if vocab_size is None else vocab_size
        eos_id = int(tokens[int(starts[1]) - 1])
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
            [tokens[begin:end]],
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
        identity=_identity(index, content.stat().st_size, cut),
    )


def _load_tokenizer(folder: Path) -> Tokenizer:
    # The run copies it for exports, which need the Hugging Face form.
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"data tokenizer {folder} is not a folder with a tokenizer.json; give the folder of "
            "the tokenizer that made the tokens, in Hugging Face form"
        )
    return load_tokenizer(folder)


def _read_header(index: Path) -> _Header:
    size = index.stat().st_size
    with open(index, "rb") as file:
        raw = file.read(_HEADER)
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


def _map_tokens(content: Path, header: _Header) -> np.ndarray:
    size = content.stat().st_size
    if size == 0 or size % header.dtype.itemsize:
        raise UserError(
            f"{content} has {size} bytes, which is no number of {header.dtype.itemsize}-byte tokens"
        )
    return np.memmap(content, dtype=header.dtype, mode="r")


def _document_starts(index: Path, content: Path, header: _Header, n_tokens: int) -> np.ndarray:
    """Token offsets of the documents (uint64 [documents + 1]), empty documents left out."""
    n = header.sequences
    sizes = np.memmap(index, dtype="<i4", mode="r", offset=_HEADER, shape=(n,))
    pointers = np.memmap(index, dtype="<i8", mode="r", offset=_HEADER + 4 * n, shape=(n,))
    boundaries = np.memmap(
        index, dtype="<i8", mode="r", offset=_HEADER + 12 * n, shape=(header.boundaries,)
    )
    if int(boundaries[0]) != 0 or int(boundaries[-1]) != n:
        raise UserError(
            f"{index}: document boundaries run from {boundaries[0]} to {boundaries[-1]}, the "
            f"sequences from 0 to {n}"
        )
    # Documents are runs of sequences, and sequences must lie end to end for a document to be
    # one run of tokens, as every writer of the format leaves them.
    expected = 0
    for at in range(0, n, _CHUNK):
        lengths = np.asarray(sizes[at : at + _CHUNK], dtype=np.int64)
        if (lengths < 0).any():
            raise UserError(f"{index}: sequence {at + int(np.argmax(lengths < 0))} is negative")
        ends = expected + np.cumsum(lengths)
        offsets = (ends - lengths) * header.dtype.itemsize
        differs = np.asarray(pointers[at : at + _CHUNK]) != offsets
        if differs.any():
            raise UserError(
                f"{index}: sequence {at + int(np.argmax(differs))} does not follow the one before"
            )
        expected = int(ends[-1])
    if expected != n_tokens:
        raise UserError(
            f"{content} holds {n_tokens} tokens, but the lengths of its index add up to {expected}"
        )
    if (boundaries[1:] < boundaries[:-1]).any():
        raise UserError(f"{index}: document boundaries fall")
    width = header.dtype.itemsize
    inner = np.asarray(pointers)[np.minimum(boundaries[:-1], n - 1)] // width
    inner[boundaries[:-1] == n] = n_tokens  # empty documents after the last sequence
    return np.unique(np.append(inner, n_tokens).astype(np.uint64))


def _largest(content: Path, tokens: np.ndarray) -> int:
    largest = 0
    for at in range(0, len(tokens), _CHUNK):
        piece = tokens[at : at + _CHUNK]
        if piece.min() < 0:
            raise UserError(f"{content}: token {at + int(np.argmax(piece < 0))} is negative")
        largest = max(largest, int(piece.max()))
    return largest


def _identity(index: Path, size: int, cut: int) -> str:
    digest = hashlib.sha256(f"megatron {size} {cut} ".encode())
    with open(index, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
