"""Text to measure a model on: documents, the words counted for them, and a limited prefix."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_gpt.data import corpus, text_files
from sparse_gpt.data.wikitext import detokenise_wikitext
from sparse_gpt.errors import UserError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Document:
    """source: the original text, which words are counted in; text: what the model reads."""

    source: str
    text: str


@dataclass(frozen=True)
class Text:
    """Documents and how to count them.

    label names the text in tables. detokenised: the model reads WikiText without its
    tokenisation. lines_end_words: each line end counts as a word, as in WikiText's official
    counts (217,646 in validation, 245,569 in test).
    """

    label: str
    source: corpus.Source
    detokenised: bool = False
    lines_end_words: bool = False

    def documents(self) -> Iterator[Document]:
        """The documents in order."""
        for source in corpus.iter_documents(self.source):
            yield self.document(source)

    def document(self, source: str) -> Document:
        """A document from its original text (also from some of its lines)."""
        return Document(source, detokenise_wikitext(source) if self.detokenised else source)

    def words(self, source: str) -> int:
        """Words of an original text: runs without white space, and line ends for WikiText."""
        return len(source.split()) + (source.count("\n") if self.lines_end_words else 0)

    @property
    def word_rule(self) -> str:
        """The rule of `words`, for the result file."""
        if self.lines_end_words:
            return "white-space words of the original lines, plus one for each line end (<eos>)"
        return "white-space words of the original text"


def local_text(paths: list[Path], text_field: str) -> corpus.Source:
    """Local files and folders as a source; `UserError` names `--text` for a wrong path."""
    for path in paths:
        if not path.exists():
            raise UserError(f"--text {path} does not exist")
        if path.is_file() and not path.name.endswith(text_files.EXTENSIONS):
            known = ", ".join(text_files.EXTENSIONS)
            raise UserError(f"--text {path}: known kinds are {known}")
    return corpus.files(paths, text_field=text_field)


def dataset_text(
    name: str, config: str | None, split: str, text_field: str, wikitext: str | None
) -> Text:
    """A split of a data set, by its name on the Hub or as a mirror folder.

    wikitext: `raw` (rows joined into articles as they are) or `detokenised`; None is `raw` for
    a data set called wikitext, and plain rows for any other. Raises `UserError` for a split that
    is not there.
    """
    splits = corpus.dataset_splits(name, config)
    if split not in splits:
        raise UserError(f"--split {split}: {name} has {', '.join(splits)}")
    if wikitext is None and Path(name).name.startswith("wikitext"):
        wikitext = "raw"
    source = corpus.dataset(
        name,
        config=config,
        split=split,
        text_field=text_field,
        # Detokenised here, article by article: the words are counted in the original.
        wikitext="raw" if wikitext else None,
    )
    label = " ".join(part for part in (config or Path(name).name, split, wikitext) if part)
    return Text(label, source, wikitext == "detokenised", lines_end_words=wikitext is not None)


def limited(text: Text, encode: Encode, limit: int | None) -> Iterator[tuple[Document, list[int]]]:
    """Documents with their token ids, up to `limit` tokens in all.

    The last document is cut after a word (after a line where lines are detokenised), so that
    words, bytes and tokens count the same text. Raises `UserError` where not even one word fits.
    """
    left, taken = limit, False
    for document in text.documents():
        if left is None:
            yield document, encode(document.text)
            continue
        cut = _prefix(text, document, encode, left)
        if cut is not None:
            taken = True
            yield cut
            left -= len(cut[1])
        if cut is None or cut[0] != document:
            break
    if limit is not None and not taken:
        raise UserError(f"--limit-tokens {limit}: the first word or line has more tokens")


def _prefix(
    text: Text, document: Document, encode: Encode, limit: int
) -> tuple[Document, list[int]] | None:
    """The longest prefix of whole units that fits, found by doubling and then halving."""
    pattern = r"[^\n]*\n|[^\n]+$" if text.detokenised else r"\s*\S+(?:\s+$)?"
    ends = [match.end() for match in re.finditer(pattern, document.source)]
    if not ends:
        return None

    def attempt(units: int) -> tuple[Document, list[int]]:
        if units == len(ends):
            return document, encode(document.text)
        part = text.document(document.source[: ends[units - 1]])
        return part, encode(part.text)

    fits, best, too_many = 0, None, len(ends) + 1
    step = 1
    while fits + 1 < too_many:
        units = min(fits + step, len(ends)) if too_many > len(ends) else (fits + too_many) // 2
        candidate = attempt(units)
        if len(candidate[1]) <= limit:
            fits, best = units, candidate
            step *= 2
        else:
            too_many = units
    return best


def total(text: Text, documents: Iterable[Document]) -> tuple[int, int]:
    """Words of the originals and UTF-8 bytes of what the model reads."""
    words = bytes_ = 0
    for document in documents:
        words += text.words(document.source)
        bytes_ += len(document.text.encode())
    return words, bytes_
