"""Text to token shards: survey, hold out, train or load the tokenizer, encode, index.

The corpus is read up to three times (count; sample for the tokenizer; encode) rather than held
in memory; a data set that would be downloaded again each time is kept in a compressed file of
the folder until the end. Everything happens in a folder beside --out that takes its place when
it is complete (see `output_folder`): nothing is lost to a bad option or an interruption.
"""

import errno
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from sparse_gpt.data.corpus import Document, Source, iter_counted
from sparse_gpt.data.encode_pool import Part, encode_parts, parts_of
from sparse_gpt.data.holdout import Holdout, HoldoutRule, resolve_holdout
from sparse_gpt.data.order import derive_key, mix64
from sparse_gpt.data.output_folder import building
from sparse_gpt.data.progress import PassProgress
from sparse_gpt.data.shard_index import (
    DTYPES,
    FORMAT,
    TOKENIZER_FOLDER,
    VERSION,
    ShardIndex,
    write_index,
)
from sparse_gpt.data.shard_writer import SHARD_TOKENS, SplitWriter, dtype_for
from sparse_gpt.data.tokenizer import Tokenizer, load_tokenizer
from sparse_gpt.data.tokenizer_training import KINDS, train_tokenizer
from sparse_gpt.errors import UserError

_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SAMPLE_PIECE = 8192


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. sources: split name -> source; documents are held out of "train" unless
    sources has a "val" itself. tokenizer: one of KINDS, or a path for `load_tokenizer`."""

    out: Path
    sources: Mapping[str, Source]
    tokenizer: str = "sentencepiece"
    vocab_size: int | None = None
    tokenizer_sample_bytes: int = 10_000_000
    holdout: HoldoutRule = field(default_factory=HoldoutRule)
    workers: int = 1
    overwrite: bool = False
    dtype: str = "auto"
    shard_tokens: int = SHARD_TOKENS


@dataclass(frozen=True)
class _Survey:
    """One source, counted; spool: its documents on disk where reading again is a download."""

    source: Source
    documents: int
    bytes: int
    spool: Path | None

    def read(self) -> Iterator[Document]:
        return iter_counted(self.source) if self.spool is None else _read_spool(self.spool)


def prepare(options: PrepareOptions) -> ShardIndex:
    """Prepare a folder and return its index.

    The shards are a pure function of the corpus, the tokenizer and the options; the number of
    workers does not matter. On any error everything written is removed again and data already in
    options.out stays; with overwrite, it is replaced when the new data is complete.
    Raises UserError for bad options or input, before anything is written where possible.
    """
    _check(options)
    try:
        with building(options.out, overwrite=options.overwrite) as folder:
            return _prepare(options, folder)
    except OSError as error:
        raise UserError(_explain(error, options.out)) from error


def _explain(error: OSError, out: Path) -> str:
    """What an error of the file system means for the user; programming errors are none."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"--out {out}: the disk is full; what was written is gone"
    return f"{error.filename or out}: {error.strerror or error}; nothing was prepared"


def _check(options: PrepareOptions) -> None:
    if not options.sources:
        raise UserError("nothing to prepare: the split map is empty")
    for name, source in options.sources.items():
        if not _SPLIT_NAME.fullmatch(name):
            raise UserError(f"--split-map: {name!r} is no split name (a-z, 0-9 and _)")
        for path in source.paths:
            if path.is_dir() and options.out.resolve().is_relative_to(path.resolve()):
                raise UserError(f"--out {options.out} lies inside --input {path}; choose another")
        if source.max_bytes is not None and source.max_bytes < 1:
            raise UserError(f"--max-bytes is {source.max_bytes}, it must be at least 1")
    if options.tokenizer_sample_bytes < 1:
        raise UserError("--tokenizer-sample-bytes must be at least 1")
    if options.tokenizer not in KINDS:
        if not Path(options.tokenizer).exists():
            raise UserError(
                f"--tokenizer {options.tokenizer} is neither a path that exists nor one of "
                f"{', '.join(KINDS)}"
            )
        if options.vocab_size is not None:
            raise UserError("--vocab-size is for a tokenizer that is trained; drop it")
    if options.dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {options.dtype!r} is none of auto, {', '.join(DTYPES)}")


def _prepare(options: PrepareOptions, folder: Path) -> ShardIndex:
    surveys = {name: _survey(folder, name, s) for name, s in options.sources.items()}
    rule = options.holdout
    holdout = Holdout(0)
    if "train" in surveys and "val" not in surveys:
        holdout = resolve_holdout(rule, surveys["train"].documents)
    tokenizer = _tokenizer(options, surveys, holdout)
    dtype = dtype_for(tokenizer.vocab_size, options.dtype)
    _check_disk(options, folder, surveys, tokenizer, dtype)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    entries = _encode(options, folder, surveys, holdout, tokenizer, dtype)
    for survey in surveys.values():
        if survey.spool is not None:
            survey.spool.unlink()
    index = ShardIndex(
        format=FORMAT,
        version=VERSION,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        source={name: survey.source.describe() for name, survey in surveys.items()},
        options=_recorded(options),
        splits=entries,
    )
    write_index(folder, index)
    return index


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    trained = options.tokenizer in KINDS
    first = next(iter(options.sources.values()))
    return {
        "tokenizer": options.tokenizer if trained else Path(options.tokenizer).name,
        "tokenizer_sample_bytes": options.tokenizer_sample_bytes if trained else None,
        "seed": options.holdout.seed,
        "val_fraction": options.holdout.val_fraction,
        "val_documents": options.holdout.val_documents,
        "test_fraction": options.holdout.test_fraction,
        "test_documents": options.holdout.test_documents,
        "text_field": first.text_field,
        "max_bytes": first.max_bytes,
        "wikitext": first.wikitext,
    }


def _survey(folder: Path, name: str, source: Source) -> _Survey:
    documents = size = 0
    spool = folder / f"{name}.documents.zst" if source.remote else None
    with PassProgress(f"reading {name}", every=10.0) as progress:
        texts = iter_counted(source)
        for document in texts if spool is None else _write_spool(spool, texts):
            n_bytes = len(document.text.encode())
            documents += 1
            size += n_bytes
            progress.add(n_bytes, 1)
    if not documents:
        raise UserError(f"split {name!r}: the corpus is empty (no document has any text)")
    return _Survey(source, documents, size, spool)


def _write_spool(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
        for document in documents:
            file.write(json.dumps(document).encode() + b"\n")
            yield document


def _read_spool(path: Path) -> Iterator[Document]:
    with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as file:
        for line in io.TextIOWrapper(file, encoding="utf-8", newline="\n"):  # pyright: ignore[reportArgumentType]
            text, words = json.loads(line)
            yield Document(text, words)


def _tokenizer(
    options: PrepareOptions, surveys: Mapping[str, _Survey], holdout: Holdout
) -> Tokenizer:
    if options.tokenizer not in KINDS:
        return load_tokenizer(options.tokenizer)
    vocab_size = options.vocab_size
    if vocab_size is None and options.tokenizer != "bytes":
        vocab_size = 8192
    name = "train" if "train" in surveys else next(iter(surveys))
    with PassProgress(f"sampling {name} for the tokenizer", every=10.0) as progress:
        texts = _sample(options, surveys[name], holdout, progress)
        return train_tokenizer(options.tokenizer, texts, vocab_size, seed=options.holdout.seed)


def _sample(
    options: PrepareOptions, survey: _Survey, holdout: Holdout, progress: PassProgress
) -> Iterator[str]:
    """Pieces of the training documents from all over the corpus, never of those held out."""
    bound = round(min(1.0, options.tokenizer_sample_bytes / survey.bytes) * 2**64)
    key, piece_number = derive_key("tokenizer", options.holdout.seed), 0
    for number, document in enumerate(survey.read()):
        if holdout.split_of(number) != "train":
            continue
        new = 1
        for piece in _line_groups(document.text):
            if mix64(key ^ piece_number) < bound:
                yield piece
                progress.add(len(piece.encode()), new)
                new = 0
            piece_number += 1


def _line_groups(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SAMPLE_PIECE, start + 4 * _SAMPLE_PIECE)
        end = start + 4 * _SAMPLE_PIECE if end < 0 else end + 1
        yield text[start:end]
        start = end


def _check_disk(
    options: PrepareOptions,
    folder: Path,
    surveys: Mapping[str, _Survey],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    """Refuse before writing where the shards cannot fit, from the tokens a byte of a sample.

    Data that will be replaced keeps its room until the new data is complete."""
    tokens = size = 0
    for document in next(iter(surveys.values())).read():
        text = document.text[: 1 << 18]
        tokens += len(tokenizer.encode(text))
        size += len(text.encode())
        if size >= 1 << 18:
            break
    total = sum(survey.bytes for survey in surveys.values())
    documents = sum(survey.documents for survey in surveys.values())
    width = int(DTYPES[dtype][-1])
    needed = int(1.2 * total * tokens / size) * width + documents * (width + 16)
    free = shutil.disk_usage(folder).free
    if free < needed:
        beside = " beside the data that they replace" if options.out.exists() else ""
        raise UserError(
            f"--out {options.out}: about {needed / 1e9:.2f} GB are needed for the tokens{beside}, "
            f"{free / 1e9:.2f} GB are free; free some or choose another disk"
        )


def _encode(
    options: PrepareOptions,
    folder: Path,
    surveys: Mapping[str, _Survey],
    holdout: Holdout,
    tokenizer: Tokenizer,
    dtype: str,
) -> dict[str, Any]:
    held_out = "train" in surveys and "val" not in surveys
    names = list(surveys)
    if held_out:
        names += [n for n in ("val", "test") if n not in names and _used(options.holdout, n)]
    order = {"train": 0, "val": 1, "test": 2}
    names.sort(key=lambda name: (order.get(name, 3), name))

    def parts() -> Iterator[Part]:
        for name, survey in surveys.items():
            documents = size = 0
            for number, document in enumerate(survey.read()):
                split = holdout.split_of(number) if name == "train" and held_out else name
                documents += 1
                size += len(document.text.encode())
                yield from parts_of(tokenizer, split, document.text, document.words)
            if (documents, size) != (survey.documents, survey.bytes):
                raise UserError(f"split {name!r}: the input changed while it was read; run again")

    writers: dict[str, SplitWriter] = {}
    try:
        for name in names:
            writers[name] = SplitWriter(
                folder, name, dtype, tokenizer.vocab_size, options.shard_tokens
            )
        total = sum(survey.bytes for survey in surveys.values())
        with PassProgress("tokenising", total) as progress:
            for part in encode_parts(tokenizer, parts(), options.workers):
                writers[part.split].add(
                    part.tokens,
                    n_bytes=part.n_bytes,
                    n_words=part.words,
                    ends_document=part.ends_document,
                )
                progress.add(part.n_bytes, part.ends_document, len(part.tokens))
        return {name: writer.close() for name, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise


def _used(rule: HoldoutRule, split: str) -> bool:
    return rule.wants_val if split == "val" else rule.wants_test
