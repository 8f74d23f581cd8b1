"""Tokenised data on disk, read where it is asked for.

A prepared folder holds `<split>-00000.bin`, ... (little-endian uint16 or uint32 token ids),
`<split>.doc.npy` (uint64: where each document starts in the whole split, then its end),
`index.json` (written last) and `tokenizer/`. A Megatron-LM `.bin/.idx` pair opens as well.
Every document ends with the end token, which belongs to it.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from sparse_gpt.data.document_starts import CHUNK, DocumentStarts
from sparse_gpt.data.number_file import NumberFile, Numbers
from sparse_gpt.data.shard_index import (
    DTYPES,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    ShardIndex,
    SplitEntry,
    read_index,
)
from sparse_gpt.data.tokenizer import folder_sha256, load_tokenizer
from sparse_gpt.durable import sha256_file
from sparse_gpt.errors import UserError
from sparse_gpt.npy import read_header


class TokenSplit:
    """One split as a single run of tokens over any number of shards.

    shards: integers. document_starts: uint64 [documents + 1], strictly rising from 0 to n_tokens.
    n_bytes and n_words are None where the format does not keep them. `name` appears in errors.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Numbers],
        document_starts: Numbers,
        vocab_size: int,
        n_bytes: int | None = None,
        n_words: int | None = None,
    ):
        self.name = name
        self._shards = list(shards)
        self._ends = list(accumulate(len(shard) for shard in self._shards))
        self.n_tokens = self._ends[-1] if self._ends else 0
        self.n_bytes = n_bytes
        self.n_words = n_words
        self.document_starts = document_starts
        self.documents = DocumentStarts(name, document_starts, self.n_tokens)
        self.n_documents = len(self.documents)
        self._vocab_size = vocab_size

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [start, start + n) as int64 [n], across shards.

        Raises IndexError outside the split, UserError for an id outside the vocabulary (a
        damaged file, or one of another tokenizer) and for a file that cannot be read any more.
        """
        if start < 0 or n < 0 or start + n > self.n_tokens:
            raise IndexError(
                f"{self.name}: tokens [{start}, {start + n}) of a split of {self.n_tokens}"
            )
        out = np.empty(n, dtype=np.int64)
        filled, shard = 0, bisect.bisect_right(self._ends, start)
        while filled < n:
            offset = start + filled - (self._ends[shard] - len(self._shards[shard]))
            piece = self._shards[shard][offset : offset + n - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        if n and (out.max() >= self._vocab_size or out.min() < 0):
            bad = int(np.argmax((out >= self._vocab_size) | (out < 0)))
            raise UserError(
                f"{self.name}: token {start + bad} is {out[bad]}, outside the vocabulary of "
                f"{self._vocab_size}; the data is damaged or of another tokenizer"
            )
        return out

    def document_ids(self, start: int, n: int) -> np.ndarray:
        """Number of the document that holds each of the tokens [start, start + n): int32 [n]."""
        if start < 0 or n < 0 or start + n > self.n_tokens:
            raise IndexError(
                f"{self.name}: tokens [{start}, {start + n}) of a split of {self.n_tokens}"
            )
        if n == 0:
            return np.empty(0, dtype=np.int32)
        first, inside = self.documents.within(start, n)
        out = np.zeros(n, dtype=np.int32)
        out[inside] = 1
        return np.cumsum(out, dtype=np.int32) + np.int32(first)


@dataclass(frozen=True)
class TokenData:
    """Opened data. tokenizer_sha256 and tokenizer_path are None where the format has none.

    identity: a digest that stays the same wherever the data lies, for checkpoints.
    """

    path: Path
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str | None
    tokenizer_path: Path | None
    splits: dict[str, TokenSplit]
    identity: str

    def split(self, name: str) -> TokenSplit:
        """The named split; UserError listing those there are."""
        if name not in self.splits:
            raise UserError(
                f"data path {self.path} has no split {name!r}; it has: "
                f"{', '.join(self.splits) or 'none'}"
            )
        return self.splits[name]


def open_data(
    path: str | Path,
    *,
    val_fraction: float = 0.01,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
) -> TokenData:
    """Open a prepared folder, or a Megatron-LM pair by its prefix (`foo` for foo.bin, foo.idx).

    val_fraction, vocab_size and tokenizer (the folder of the one that made the tokens) are for a
    Megatron pair, which knows none of them: see `sparse_gpt.data.megatron.open_megatron`. With
    neither vocab_size nor tokenizer every opening of a pair, so every rank of a run at its start,
    reads all of its tokens to find the largest.
    A prepared folder's file sizes and its tokenizer are checked against the index; the digests
    of its tokens only by `verify`. Raises UserError saying what is wrong with which file.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"data path {str(path)[:200]}: {error.strerror}") from None
    if is_folder:
        for key, value in (("vocab_size", vocab_size), ("tokenizer", tokenizer)):
            if value is not None:
                raise UserError(
                    f"data path {path} is a prepared folder, which has its own {key}; drop {key}, "
                    "it is for a Megatron .bin/.idx pair"
                )
        return _open_folder(path)
    from sparse_gpt.data.megatron import is_megatron, open_megatron

    if is_megatron(path):
        return open_megatron(
            path, val_fraction=val_fraction, vocab_size=vocab_size, tokenizer=tokenizer
        )
    if not path.exists():
        raise UserError(
            f"data path {path} does not exist; give a folder made by prepare_data.py or the "
            "prefix of a Megatron .bin/.idx pair"
        )
    raise UserError(f"data path {path} is neither a folder nor the prefix of a .bin/.idx pair")


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise UserError(f"data path {folder}: {name} is missing; prepare the data again")
    if path.resolve().parent != folder.resolve():
        raise UserError(f"data path {folder}: {name} is a link that leads out of the folder")
    return path


def _open_folder(folder: Path) -> TokenData:
    index = read_index(folder)
    if index.eos_id >= index.vocab_size:
        raise UserError(
            f"{folder / INDEX_FILE}: eos_id {index.eos_id} is outside the vocabulary of "
            f"{index.vocab_size}; prepare the data again"
        )
    splits = {name: _open_split(folder, index, name, e) for name, e in index.splits.items()}
    tokenizer = _check_tokenizer(folder, index)
    return TokenData(
        path=folder,
        vocab_size=index.vocab_size,
        eos_id=index.eos_id,
        tokenizer_sha256=index.tokenizer_sha256,
        tokenizer_path=tokenizer,
        splits=splits,
        identity=index.identity,
    )


def _check_tokenizer(folder: Path, index: ShardIndex) -> Path:
    """Its folder, once its hash is that of the index (its files are read, it is not built)."""
    tokenizer = folder / TOKENIZER_FOLDER
    if not tokenizer.is_dir():
        raise UserError(
            f"data path {folder}: the {TOKENIZER_FOLDER} folder is missing; prepare the data again"
        )
    found = folder_sha256(tokenizer)
    if found != index.tokenizer_sha256:
        raise UserError(
            f"data path {folder}: the tokenizer in {tokenizer} is not the one of the index "
            f"(sha256 {found[:12]}, not {index.tokenizer_sha256[:12]}); prepare the data again"
        )
    return tokenizer


def _open_split(folder: Path, index: ShardIndex, name: str, entry: SplitEntry) -> TokenSplit:
    dtype = np.dtype(DTYPES[index.dtype])
    shards = []
    for shard in entry.shards:
        file = _inside(folder, shard.file)
        size = file.stat().st_size
        if size != shard.tokens * dtype.itemsize or size == 0:
            raise UserError(
                f"{file} has {size} bytes, but {shard.tokens} tokens of {index.dtype} are expected"
            )
        shards.append(NumberFile(file, dtype, count=shard.tokens))
    documents = _inside(folder, entry.documents_file)
    starts = _open_boundaries(documents, entry.documents)
    where = f"{folder} split {name!r}"
    return TokenSplit(where, shards, starts, index.vocab_size, entry.bytes, entry.words)


def _open_boundaries(path: Path, documents: int) -> NumberFile:
    try:
        with open(path, "rb") as file:
            header = read_header(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; prepare the data again") from error
    if header.descr != "<u8":
        raise UserError(f"{path}: document boundaries must be uint64, these are {header.descr}")
    if header.shape != (documents + 1,):
        raise UserError(
            f"{path} has shape {header.shape}, the index says {documents} documents; prepare the "
            "data again"
        )
    size, needed = path.stat().st_size, header.offset + 8 * (documents + 1)
    if size != needed:
        raise UserError(f"{path} has {size} bytes, but {documents} documents need {needed}")
    return NumberFile(path, "<u8", header.offset, documents + 1)


def verify(path: str | Path, *, full: bool = True) -> None:
    """Check a prepared folder; full=True also reads every byte.

    Full: sha256 of every file, every id inside the vocabulary, the end token at the end of
    every document, and that the tokenizer loads. Raises UserError naming the first file that fails.
    """
    folder = Path(path)
    data, index = _open_folder(folder), read_index(folder)
    if not full:
        return
    for name, entry in index.splits.items():
        expected = [(shard.file, shard.sha256) for shard in entry.shards]
        for file, digest in [*expected, (entry.documents_file, entry.documents_sha256)]:
            try:
                found = sha256_file(folder / file)
            except OSError as error:
                raise UserError(f"{folder / file} cannot be read: {error.strerror}") from error
            if found != digest:
                raise UserError(f"{folder / file}: sha256 differs from the index; it is damaged")
        _verify_tokens(data.splits[name], index.eos_id)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    if (tokenizer.vocab_size, tokenizer.eos_id) != (index.vocab_size, index.eos_id):
        raise UserError(
            f"{folder}: the index says vocab_size {index.vocab_size} and eos_id {index.eos_id}, "
            f"its tokenizer has {tokenizer.vocab_size} and {tokenizer.eos_id}"
        )


def _verify_tokens(split: TokenSplit, eos_id: int) -> None:
    for start in range(0, split.n_tokens, CHUNK):
        tokens = split.read(start, min(CHUNK, split.n_tokens - start))
        last = split.documents.within(start, len(tokens) + 1)[1] - 1
        if (tokens[last] != eos_id).any():
            bad = start + int(last[np.argmax(tokens[last] != eos_id)])
            raise UserError(f"{split.name}: the document that ends at token {bad} has no end token")
