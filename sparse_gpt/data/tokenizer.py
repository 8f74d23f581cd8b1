"""Tokenizers: loaded from what people have, kept as one canonical Hugging Face folder.

The canonical folder (tokenizer.json, tokenizer_config.json, special_tokens_map.json) is what the
stock `AutoTokenizer.from_pretrained(folder)` loads, and its ids are the ids in the shards: the
fast tokenizer in tokenizer.json is the truth, also where it was converted from sentencepiece.
Nothing is added to a text by default; a document in the shards is encode(text) + [eos_id].

As in `transformers`, the literal text of a special token (such as "<|endoftext|>") inside a
document is read as that token.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sparse_gpt.data.sentencepiece_model import WORD_PATTERN, convert_sentencepiece
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_bytes, read_object

LARGEST_FILE = 64 << 20  # bytes; the largest vocabularies, of 256,000 tokens, take half of it
SPARE_IDS = 65_536  # ids that no token has, besides as many as there are tokens
END_OF_TEXT = "<|endoftext|>"
SENTENCEPIECE_FILE = "tokenizer.model"
CANONICAL_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# A cut between a word character (or closing punctuation) and a blank is a token boundary for
# every pre-tokenizer accepted by `_splits_at_blanks`.
_SAFE_CUT = re.compile(r"[\w.,;:!?\"')\]}](?= )")


def byte_alphabet() -> list[str]:
    """The printable stand-in for each of the 256 byte values that byte-level tokenizers use."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {value: chr(value) for value in printable}
    others = (value for value in range(256) if value not in alphabet)
    alphabet.update({value: chr(256 + n) for n, value in enumerate(others)})
    return [alphabet[value] for value in range(256)]


class Tokenizer:
    """A fast tokenizer with a known end-of-document token.

    spec: the content of tokenizer.json. vocab_size is the largest id + 1, added tokens included.
    sha256 covers the content of tokenizer.json (canonical JSON) and the end token, so it does not
    depend on how the file is formatted.
    """

    vocab_size: int
    eos_id: int
    sha256: str

    def __init__(self, spec: dict[str, Any], eos_token: str, sentencepiece: bytes | None = None):
        self._spec = _canonical(spec)
        self.eos_token = eos_token
        self._sentencepiece = sentencepiece
        model = self._spec.get("model")
        _check_ids(model.get("vocab") if isinstance(model, dict) else None)
        canonical = _canonical_json(self._spec)
        self._backend = Backend.from_str(canonical)
        self.sha256 = _digest(canonical, eos_token)
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        _check_count(len(ids), self.vocab_size - 1)
        eos_id = self._backend.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"tokenizer: the end token {eos_token[:60]!r} is not in its vocabulary")
        self.eos_id = eos_id
        self._separable = _splits_at_blanks(self._spec)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added before or after."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text."""
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens appear as their own text."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def parts(self, text: str, size: int) -> Iterator[str]:
        """Cut a long text into parts of about `size` characters whose ids, joined, are those of
        the whole; a text (or tokenizer) with no such places comes back in larger parts."""
        start = 0
        while self._separable and len(text) - start > size:
            cut = _SAFE_CUT.search(text, start + size)
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:] if start else text

    def save(self, folder: str | Path) -> None:
        """Write the canonical folder; the original sentencepiece model goes beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # No unk_token: AutoTokenizer would make its text, which WikiText contains, a symbol.
        special = {"eos_token": self.eos_token}
        config = {
            # The generic fast class: model-specific ones rebuild the tokenizer their own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **special,
        }
        for name, content in zip(CANONICAL_FILES, (self._spec, config, special), strict=True):
            text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True)
            _write(folder / name, f"{text}\n".encode())
        if self._sentencepiece is not None:
            _write(folder / SENTENCEPIECE_FILE, self._sentencepiece)

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self._spec, "eos": self.eos_token, "sentencepiece": self._sentencepiece}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["spec"], state["eos"], state["sentencepiece"])


def _check_ids(vocab: Any) -> None:
    """Of a vocabulary {token: id}, before the library makes a table as long as the largest."""
    if isinstance(vocab, dict):
        ids = [i for i in vocab.values() if type(i) is int]
        _check_count(len(ids), max(ids, default=0))


def _check_count(tokens: int, largest: int) -> None:
    if largest >= 2 * tokens + SPARE_IDS:  # each id is a row of the embedding
        raise UserError(
            f"tokenizer: {tokens} tokens, but ids up to {largest}; number its tokens from 0"
        )


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # the shards are worthless without it


def _canonical_json(spec: dict[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True, separators=(",", ":"))


def _digest(canonical: str, eos_token: str) -> str:
    return hashlib.sha256(f"{canonical}\n{eos_token}".encode()).hexdigest()


def _canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json without what would add, cut or pad tokens by default."""
    spec = {**spec, "truncation": None, "padding": None}
    processor = spec.get("post_processor")
    if processor is not None:
        nested = [processor]
        if isinstance(processor, dict) and processor.get("type") == "Sequence":
            nested = processor.get("processors")
        if not isinstance(nested, list) or not all(isinstance(p, dict) for p in nested):
            raise ValueError("post_processor is none")
        kept = [p for p in nested if p.get("type") == "ByteLevel"]
        spec["post_processor"] = kept[0] if kept else None
    return spec


def _splits_at_blanks(spec: dict[str, Any]) -> bool:
    """Whether this tokenizer never makes a token across "x| y" (x a word character).

    Only forms known for certain count; any other tokenizer encodes each document whole.
    """
    for token in spec.get("added_tokens") or []:
        if token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]):
            return False
    normalizer = spec.get("normalizer")
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if normalizer not in (None, escape):
        return False
    pre = spec.get("pre_tokenizer")
    if pre is None:
        return False
    if pre["type"] == "ByteLevel":
        plain_bytes = spec["model"]["type"] == "BPE" and not spec["model"]["merges"]
        return not pre["add_prefix_space"] and (pre["use_regex"] or plain_bytes)
    return (
        pre["type"] == "Split"
        and pre["pattern"] == {"Regex": WORD_PATTERN}
        and pre["behavior"] == "Isolated"
        and not pre["invert"]
    )


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], regex: bool) -> Backend:
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _with_end_token(backend: Backend, token: str) -> Tokenizer:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return Tokenizer(json.loads(backend.to_str()), token)


def byte_tokenizer() -> Tokenizer:
    """256 byte values (id = value) and the end token (id 256)."""
    vocab = {symbol: value for value, symbol in enumerate(byte_alphabet())}
    return _with_end_token(_byte_level(vocab, [], regex=False), END_OF_TEXT)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face folder, a folder of GPT-2 files, or a sentencepiece model.

    path: a folder with tokenizer.json, or vocab.json + merges.txt, or tokenizer.model; or a
    sentencepiece `.model` file. No code of the folder runs and no network is used.
    Raises UserError naming what is missing or unreadable.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path)
    if not path.is_dir():
        raise UserError(f"tokenizer: {path} is neither a folder nor a sentencepiece .model file")
    if (path / "tokenizer.json").is_file():
        return _load_folder(path)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _load_gpt2(path)
    if (path / SENTENCEPIECE_FILE).is_file():
        return _load_sentencepiece(path / SENTENCEPIECE_FILE)
    raise UserError(
        f"tokenizer: {path} holds no tokenizer.json, no vocab.json with merges.txt and no "
        f"{SENTENCEPIECE_FILE}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, LARGEST_FILE, unique=False)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: {path} is not valid JSON ({error})") from error


def folder_sha256(folder: str | Path) -> str:
    """`Tokenizer.sha256` of a Hugging Face folder, from its files alone: nothing is built.

    Raises UserError naming what is missing or unreadable.
    """
    spec, eos_token = _read_folder(Path(folder))
    try:
        return _digest(_canonical_json(_canonical(spec)), eos_token)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer: {Path(folder) / 'tokenizer.json'}: {error}") from error


def _read_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """The content of tokenizer.json and the end token."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"tokenizer: there is no tokenizer.json in {folder}")
    spec = _read_json(folder / "tokenizer.json")
    eos = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if eos is None and (folder / name).is_file():
            eos = _read_json(folder / name).get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str):
        raise UserError(
            f"tokenizer: {folder} names no end token; set eos_token in tokenizer_config.json"
        )
    return spec, eos


def _load_folder(folder: Path) -> Tokenizer:
    spec, eos = _read_folder(folder)
    model = folder / SENTENCEPIECE_FILE
    content = _read_model(model) if model.is_file() else None
    return _built(folder / "tokenizer.json", lambda: Tokenizer(spec, eos, content))


def _built(path: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """What `make` makes of a file; `UserError` naming it where it cannot."""
    try:
        return make()
    except UserError as error:
        text = str(error).removeprefix("tokenizer: ")
        where = "" if str(path) in text else f"{path}: "
        raise UserError(f"tokenizer: {where}{text}") from error
    except Exception as error:  # the Rust library raises bare Exception for a bad file
        raise UserError(f"tokenizer: {path}: {str(error)[:500]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a Rust library, and no Exception
            raise
        raise UserError(f"tokenizer: {path}: {str(error)[:500]}") from error


def _read_model(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from error


def _load_gpt2(folder: Path) -> Tokenizer:
    vocab = _read_json(folder / "vocab.json")
    merges = []
    try:
        lines = _read_model(folder / "merges.txt").decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer: {folder / 'merges.txt'} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise UserError(f"tokenizer: {folder / 'merges.txt'} line {number} is not a pair")
        merges.append((pair[0], pair[1]))
    if END_OF_TEXT not in vocab:
        raise UserError(f"tokenizer: {folder / 'vocab.json'} has no {END_OF_TEXT}")

    def make() -> Tokenizer:
        _check_ids(vocab)
        return _with_end_token(_byte_level(vocab, merges, regex=True), END_OF_TEXT)

    return _built(folder / "vocab.json", make)


def _load_sentencepiece(path: Path) -> Tokenizer:
    content = _read_model(path)

    def make() -> Tokenizer:
        spec, eos = convert_sentencepiece(content, str(path))
        return Tokenizer(spec, eos, content)

    return _built(path, make)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Write the tokenizer of a Hugging Face folder to another (of a run, of an export).

    In canonical form: a canonical folder is copied byte for byte, of any other only what gives
    the ids of the shards (nothing that adds tokens, no weights that lie beside it).
    Raises UserError where the source has no tokenizer.json, or one that cannot be read.
    """
    _load_folder(Path(source)).save(target)
