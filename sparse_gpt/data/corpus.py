"""Documents from files, from Hugging Face data sets, or from Python's own standard library.

Everything streams: at most one document is in memory, however large the corpus.
"""

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from sparse_gpt.data import dataset_files, text_files
from sparse_gpt.data.wikitext import detokenise_wikitext, wikitext_articles
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import LARGEST

MAX_DOCUMENT_BYTES = 1 << 30
STDLIB_BYTES = 10_000_000
CODE: dict[str, str] = {
    **dict.fromkeys((".py", ".pyc", ".so"), "Python code"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), "a pickle"),
}
_STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class Document(NamedTuple):
    """A document as it will be encoded, and the white-space words of its SOURCE text (they
    differ where WikiText is detokenised)."""

    text: str
    words: int


@dataclass(frozen=True)
class Source:
    """Where documents come from. Make one with `files`, `dataset` or `standard_library`.

    split: of a data set. wikitext: None, or rows are WikiText lines to join into articles, kept
    "raw" or "detokenised". max_bytes: stop after that many UTF-8 bytes of text (the last
    document is cut at a character).
    """

    kind: Literal["files", "dataset", "stdlib"]
    paths: tuple[Path, ...] = ()
    name: str = ""
    config: str | None = None
    split: str | None = None
    text_field: str = "text"
    encoding: str = "utf-8"
    wikitext: Literal["raw", "detokenised"] | None = None
    max_bytes: int | None = None

    @property
    def remote(self) -> bool:
        """Whether reading it again means downloading it again."""
        return self.kind == "dataset" and not Path(self.name).exists()

    def describe(self) -> dict[str, Any]:
        """What the index records about the source (no folder names of this machine)."""
        described: dict[str, Any] = {"kind": self.kind}
        if self.kind == "files":
            described["inputs"] = [path.name for path in self.paths]
        if self.kind == "dataset":
            name = f"{Path(self.name).parent.name}/{Path(self.name).name}"
            described |= {"name": name, "config": self.config, "split": self.split}
        if self.kind == "stdlib":
            described["python"] = platform.python_version()
        if self.wikitext is not None:
            described["wikitext"] = self.wikitext
        return described


def files(paths: list[str] | list[Path], **options: Any) -> Source:
    """Local files and folders (searched recursively, in sorted order)."""
    if not paths:
        raise UserError("--input needs at least one path")
    return Source("files", paths=tuple(Path(path) for path in paths), **options)


def dataset(name: str, *, config: str | None = None, split: str, **options: Any) -> Source:
    """A Hugging Face data set by name (streamed) or a folder that mirrors one.

    WikiText (any data set of that name) is joined into articles, raw unless said otherwise.
    """
    if Path(name).name == "wikitext" and options.get("wikitext") is None:
        options["wikitext"] = "raw"
    return Source("dataset", name=name, config=config, split=split, **options)


def standard_library(max_bytes: int = STDLIB_BYTES) -> Source:
    """The `.py` files of the running Python's standard library, without its tests.

    Whole files in sorted order as long as they fit in max_bytes, so it is the same for every
    run of one Python version, and different between versions.
    """
    return Source("stdlib", max_bytes=max_bytes)


def iter_documents(source: Source) -> Iterator[str]:
    """The texts of a source, in a fixed order; texts of white space only are left out.

    Raises UserError naming file and place for anything unreadable, and where nothing is found.
    """
    for document in iter_counted(source):
        yield document.text


def iter_counted(source: Source) -> Iterator[Document]:
    """`iter_documents` with each document's number of source words."""
    if source.kind == "stdlib":
        texts = _standard_library_texts(source.max_bytes or STDLIB_BYTES)
    else:
        texts = _rows(source)
    if source.wikitext is not None:
        texts = wikitext_articles(texts)
    budget = source.max_bytes if source.kind != "stdlib" else None
    for text in texts:
        if not text or text.isspace():
            continue
        words = len(text.split())
        if source.wikitext == "detokenised":
            text = detokenise_wikitext(text)
        if budget is not None:
            content = text.encode()
            if len(content) > budget:
                text = content[:budget].decode("utf-8", errors="ignore")
                words = len(text.split())
            budget -= min(budget, len(content))
        if text:
            yield Document(text, words)
        if budget == 0:
            return


def _rows(source: Source) -> Iterator[str]:
    if source.kind == "dataset":
        yield from _dataset_rows(source)
        return
    found = text_files.find(source.paths)
    for path in found:
        yield from text_files.read_texts(
            path,
            text_field=source.text_field,
            encoding=source.encoding,
            lines=source.wikitext is not None,
            limit=MAX_DOCUMENT_BYTES,
        )


def _standard_library_texts(limit: int) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, filenames in os.walk(root):
        names[:] = [name for name in names if name not in _STDLIB_SKIPPED]
        found += [Path(folder, name) for name in filenames if name.endswith(".py")]
    total = 0
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        with tokenize.open(path) as file:  # honours the file's own encoding declaration
            text = file.read()
        total += len(text.encode())
        if total > limit:
            return
        yield text


def _import_datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


def dataset_splits(name: str, config: str | None) -> list[str]:
    """Names of the splits of a data set; UserError where it cannot be opened."""
    return list(_open_dataset(name, config))


def _open_dataset(name: str, config: str | None) -> Any:
    if Path(name).is_dir():
        refuse_code(Path(name), f"--dataset {name}")
        refuse_elsewhere(Path(name), f"--dataset {name}")
    datasets = _import_datasets()
    try:
        with dataset_files.watched(MAX_DOCUMENT_BYTES):
            builder = datasets.load_dataset_builder(name, config)
            if builder.__module__.endswith(".webdataset"):
                raise UserError(
                    f"--dataset {name} is of tar archives, which the library unpacks and decodes "
                    "without a bound; unpack them, and give the texts to --input"
                )
            # Streaming: nothing is copied to a cache, and only what is read is downloaded.
            return builder.as_streaming_dataset()
    except UserError:
        raise
    except Exception as error:  # the library raises many types; the user sees its message
        detail = dataset_files.first_line(error)
        raise UserError(
            f"--dataset {name} (--config {config}) cannot be opened: {detail}"
        ) from error


def refuse_code(folder: Path, where: str) -> None:
    """Raise `UserError` for a data set's folder with Python code or pickles anywhere in it.

    The libraries run neither; a set that comes with them means them to be run.
    """
    for path in sorted(folder.rglob("*")):
        what = CODE.get(path.suffix.lower())
        if what is not None:
            raise UserError(
                f"{where} holds {what} ({path.relative_to(folder)}); data sets that run code are "
                "refused (convert it to parquet, or give its files to --input)"
            )


def refuse_elsewhere(folder: Path, where: str) -> None:
    """Raise `UserError` for a data set's folder whose description names files outside it.

    Before anything opens the set: `datasets` would follow such a name, on another machine too.
    """
    from huggingface_hub.repocard import metadata_load

    for path, read in (
        (folder / "README.md", metadata_load),
        (folder / ".huggingface.yaml", lambda path: yaml.safe_load(path.read_bytes())),
    ):
        if not path.is_file():
            continue
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{where}: {path} has more than {LARGEST:,} bytes, too many for a description; "
                "move it away"
            )
        try:
            described = read(path)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{where}: {path} cannot be read: {error!s:.500}") from error
        configs = described.get("configs") if isinstance(described, dict) else None
        for name in _strings(configs, set()):
            # fsspec's names: protocol://path, outer::inner
            path_only = "://" not in name and "::" not in name
            if not path_only or name.startswith(("/", "~")) or ".." in Path(name).parts:
                raise UserError(f"{where}: {path} takes files from {name:.200}, outside its folder")


def _strings(value: Any, seen: set[int]) -> Iterator[str]:
    """Every string in nested lists and dictionaries, once; of the latter the values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))  # a list may hold itself, or one list a million times
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each, seen)


def _dataset_rows(source: Source) -> Iterator[str]:
    splits = _open_dataset(source.name, source.config)
    what = f"--dataset {source.name} split {source.split}"
    if source.split not in splits:
        raise UserError(
            f"--dataset {source.name} has no split {source.split!r}; it has: {', '.join(splits)}; "
            "choose with --split-map, for example train=validation"
        )
    for where, row in dataset_files.rows(splits[source.split], what, MAX_DOCUMENT_BYTES):
        yield text_files.text_of(row, source.text_field, where, MAX_DOCUMENT_BYTES)
