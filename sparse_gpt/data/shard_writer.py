"""Writing one split: a stream of token arrays into shards, in bounded memory."""

import hashlib
import os
from pathlib import Path

import numpy as np

from sparse_gpt.data.shard_index import DTYPES, ShardEntry, SplitEntry
from sparse_gpt.durable import sha256_file
from sparse_gpt.errors import UserError

SHARD_TOKENS = 1 << 28


def dtype_for(vocab_size: int, wanted: str = "auto") -> str:
    """The name of the smallest dtype that holds the vocabulary, or `wanted` if it does.

    Raises UserError where the wanted dtype is too small.
    """
    smallest = "uint16" if vocab_size <= 1 << 16 else "uint32"
    if vocab_size > 1 << 32:
        raise UserError(f"a vocabulary of {vocab_size} does not fit in uint32")
    if wanted == "auto":
        return smallest
    if wanted not in DTYPES:
        raise UserError(f"--dtype {wanted!r} is none of auto, {', '.join(DTYPES)}")
    if wanted == "uint16" and smallest != "uint16":
        raise UserError(
            f"--dtype uint16 holds 65,536 ids but the tokenizer has {vocab_size}; use uint32"
        )
    return wanted


class SplitWriter:
    """Append documents to `<folder>/<split>-NNNNN.bin`; `close` returns the split's entry."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        vocab_size: int,
        shard_tokens: int = SHARD_TOKENS,
    ):
        if shard_tokens < 1:
            raise UserError(f"shard_tokens is {shard_tokens}, it must be at least 1")
        self.folder, self.split = folder, split
        self.tokens = self.documents = self.bytes = self.words = 0
        self._dtype = np.dtype(DTYPES[dtype])
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._shards: list[ShardEntry] = []
        self._file = self._hash = None
        self._in_shard = 0
        self._raw_starts = folder / f"{split}.doc.tmp"
        self._starts = open(self._raw_starts, "wb")  # noqa: SIM115 - closed in close/abort
        self._starts.write(np.uint64(0).tobytes())

    def add(self, tokens: np.ndarray, *, n_bytes: int, n_words: int, ends_document: bool) -> None:
        """Append tokens (1-D integers) of the current document; the last part ends it."""
        if len(tokens) and (tokens.max() >= self._vocab_size or tokens.min() < 0):
            raise UserError(
                f"split {self.split}: token id {tokens.max()} is outside the vocabulary of "
                f"{self._vocab_size}"
            )
        at = 0
        while at < len(tokens):
            if self._file is None:
                self._start_shard()
            piece = tokens[at : at + self._shard_tokens - self._in_shard].astype(self._dtype)
            content = piece.tobytes()
            self._file.write(content)  # pyright: ignore[reportOptionalMemberAccess]
            self._hash.update(content)  # pyright: ignore[reportOptionalMemberAccess]
            self._in_shard += len(piece)
            at += len(piece)
            if self._in_shard == self._shard_tokens:
                self._finish_shard()
        self.tokens += len(tokens)
        self.bytes += n_bytes
        self.words += n_words
        if ends_document:
            self.documents += 1
            self._starts.write(np.uint64(self.tokens).tobytes())

    def close(self) -> SplitEntry:
        """Finish the files and describe them."""
        if self._file is not None:
            self._finish_shard()
        self._starts.close()
        name = f"{self.split}.doc.npy"
        with open(self.folder / name, "wb") as out, open(self._raw_starts, "rb") as raw:
            header = {"descr": "<u8", "fortran_order": False, "shape": (self.documents + 1,)}
            np.lib.format.write_array_header_1_0(out, header)
            while block := raw.read(1 << 22):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        self._raw_starts.unlink()
        return SplitEntry(
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.bytes,
            words=self.words,
            documents_file=name,
            documents_sha256=sha256_file(self.folder / name),
            shards=self._shards,
        )

    def abort(self) -> None:
        """Close the files of an unfinished split; without an index they are no data."""
        self._starts.close()
        if self._file is not None:
            self._file.close()

    def _start_shard(self) -> None:
        self._name = f"{self.split}-{len(self._shards):05d}.bin"
        self._file = open(self.folder / self._name, "wb")  # noqa: SIM115 - see _finish_shard
        self._hash = hashlib.sha256()

    def _finish_shard(self) -> None:
        assert self._file is not None and self._hash is not None
        self._file.flush()
        os.fsync(self._file.fileno())  # the index, written last, must not outlive its shards
        self._file.close()
        self._shards.append(
            ShardEntry(file=self._name, tokens=self._in_shard, sha256=self._hash.hexdigest())
        )
        self._file = self._hash = None
        self._in_shard = 0
