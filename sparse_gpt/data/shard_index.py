"""index.json of a prepared folder: its fields, reading and atomic writing."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_gpt.durable import write_text
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json

FORMAT = "sparse_gpt-tokens"
VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
MAX_VOCABULARY = 2**30  # each token is a row of the embedding
DTYPES = {"uint16": "<u2", "uint32": "<u4"}

Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardEntry(_Strict):
    """One `.bin` file: its name inside the folder, tokens and digest."""

    file: str
    tokens: Count
    sha256: Digest


class SplitEntry(_Strict):
    """One split. bytes: UTF-8 bytes encoded; words: white-space words of the source text."""

    tokens: Count
    documents: Count
    bytes: Count
    words: Count
    documents_file: str
    documents_sha256: Digest
    shards: list[ShardEntry]


class ShardIndex(_Strict):
    """The whole index. source and options are records for the reader, not used on loading."""

    format: Literal["sparse_gpt-tokens"]
    version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    eos_id: Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]
    tokenizer_sha256: Digest
    source: dict[str, Any]
    options: dict[str, Any]
    splits: dict[str, SplitEntry]

    @property
    def identity(self) -> str:
        """A digest of what the tokens are (not of where they came from), for checkpoints."""
        content = self.model_dump(exclude={"source", "options"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write index.json atomically: it is there whole, or not there."""
    write_text(folder / INDEX_FILE, index.model_dump_json(indent=1) + "\n")


def read_index(folder: Path) -> ShardIndex:
    """Read and check index.json alone (not the files it names).

    Raises UserError where it is missing, malformed, of another version or names a path that
    is not a plain file name.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(
            f"data path {folder} has no {INDEX_FILE}: it was not made by prepare_data.py, or the "
            "preparation did not finish; run it (again)"
        )
    try:
        raw = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); prepare the data again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not an index of prepared data")
    if type(raw.get("version")) is not int or raw["version"] != VERSION:
        raise UserError(
            f"{path} has format version {raw.get('version')!r:.40}, this code reads {VERSION}; "
            "prepare the data again"
        )
    try:
        index = ShardIndex.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field[:200]}: {first['msg']}") from error
    _check_names(path, index)
    return index


def _check_names(path: Path, index: ShardIndex) -> None:
    seen: set[str] = set()
    for split, entry in index.splits.items():
        for name in [entry.documents_file, *(shard.file for shard in entry.shards)]:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
                raise UserError(
                    f"{path}: split {split[:40]!r} names {name[:80]!r}, which is not a plain file "
                    "name"
                )
            if name in seen:
                raise UserError(f"{path}: {name} is named twice; a file is part of one split once")
            seen.add(name)
        total = sum(shard.tokens for shard in entry.shards)
        if total != entry.tokens:
            raise UserError(
                f"{path}: split {split!r} says {entry.tokens} tokens but its shards hold {total}"
            )
