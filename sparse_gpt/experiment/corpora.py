"""The data of an experiment: where it lies, and making it where it is not there."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_gpt.data import corpus as documents
from sparse_gpt.data import text_files
from sparse_gpt.data.holdout import HoldoutRule
from sparse_gpt.data.megatron import is_megatron
from sparse_gpt.data.prepare import PrepareOptions, prepare
from sparse_gpt.data.shards import TokenData, open_data
from sparse_gpt.data.tokenizer_training import KINDS
from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.spec import Corpus, Experiment
from sparse_gpt.json_file import read_object

STAMP = "corpus.json"  # beside a prepared folder: the settings and the files that made it


@dataclass(frozen=True)
class Corpora:
    """The corpora of an experiment below the folder `work`."""

    experiment: Experiment
    work: Path

    def path(self, name: str) -> Path:
        """Where a corpus lies, or will."""
        own = self.experiment.data[name].path
        return own if own is not None else self.work / "data" / name

    def opened(self, name: str) -> TokenData | None:
        """The data; None where it is not there, or was made with other settings or of other files.

        Where its files are not to be found now, it is taken as it was made.
        """
        path = self.path(name)
        if self.experiment.data[name].path is None:
            made = _read_stamp(path.with_name(f"{name}.{STAMP}"))
            if made.get("settings") != self.settings_sha256(name) or not path.exists():
                return None
            files = self._files_sha256(name)
            if files is not None and files != made.get("files"):
                return None
        elif not (path.exists() or is_megatron(path)):
            return None
        return open_data(path)

    def vocab_size(self, name: str) -> int:
        """Of the data if it is there, else as the experiment says."""
        data, said = self.opened(name), self.experiment.data[name].vocab_size
        if data is None and said is None:
            raise UserError(
                f"data.{name}: not there yet, and its vocabulary is not known; set "
                f"data.{name}.vocab_size"
            )
        if data is None:
            return said or 0
        if said is not None and said != data.vocab_size:
            raise UserError(
                f"data.{name}.vocab_size: {said}, but the data at {data.path} has "
                f"{data.vocab_size}; set it so, or prepare the data again"
            )
        return data.vocab_size

    def settings_sha256(self, name: str) -> str:
        """Of what makes a corpus what it is, wherever its text lies."""
        corpus = self.experiment.data[name]
        settings = corpus.model_dump_json(exclude={"path", "input"})
        parent = corpus.tokenizer_of
        of = self.settings_sha256(parent) if parent is not None else ""
        return hashlib.sha256((settings + of).encode()).hexdigest()

    def _files_sha256(self, name: str) -> str | None:
        """Of names, sizes and times of the files a corpus is made from, and of its tokenizer's.

        None where they are not to be found here, or lie elsewhere (a data set of the Hub).
        """
        corpus = self.experiment.data[name]
        digest = hashlib.sha256()
        try:
            if corpus.input is not None:
                where = f"data.{name}.input"
                inputs = [Path(expanded(text, where)) for text in _inputs(corpus)]
                files = text_files.find(inputs)
            elif corpus.dataset is not None:
                folder = Path(expanded(corpus.dataset, f"data.{name}.dataset"))
                files = sorted(path for path in folder.rglob("*") if path.is_file())
            else:
                return None
        except UserError:
            return None
        for path in files:
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        if corpus.tokenizer_of is not None:
            digest.update((self._files_sha256(corpus.tokenizer_of) or "").encode())
        return digest.hexdigest() if files else None

    def prepare(self, name: str, workers: int) -> TokenData:
        """The data, made first where it is not there. Raises `UserError` where it cannot be."""
        found = self.opened(name)
        if found is not None:
            return found
        corpus = self.experiment.data[name]
        if corpus.path is not None:
            raise UserError(
                f"data.{name}.path: nothing at {corpus.path}; prepare it with "
                "launch/prepare_data.py, or give another path"
            )
        tokenizer = corpus.tokenizer
        if corpus.tokenizer_of is not None:
            of = self.prepare(corpus.tokenizer_of, workers)
            tokenizer = str(of.tokenizer_path)
        trained = tokenizer in KINDS
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = {"settings": self.settings_sha256(name), "files": self._files_sha256(name)}
        prepare(
            PrepareOptions(
                out=path,
                sources=_sources(name, corpus),
                tokenizer=tokenizer,
                vocab_size=corpus.vocab_size if trained else None,
                tokenizer_sample_bytes=corpus.tokenizer_sample_bytes,
                holdout=HoldoutRule(
                    corpus.seed,
                    corpus.val_fraction,
                    corpus.val_documents,
                    corpus.test_fraction,
                    corpus.test_documents,
                ),
                workers=workers,
                overwrite=True,
            )
        )
        write_json(path.with_name(f"{name}.{STAMP}"), stamp)
        self.vocab_size(name)  # as said
        return open_data(path)


def _inputs(corpus: Corpus) -> list[str]:
    given = corpus.input or ()
    return [given] if isinstance(given, str) else list(given)


def _read_stamp(path: Path) -> dict[str, Any]:
    """What made a prepared folder; empty where that is not known, and it is made again."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _sources(name: str, corpus: Corpus) -> dict[str, documents.Source]:
    common: dict[str, Any] = {
        "text_field": corpus.text_field,
        "wikitext": corpus.wikitext,
        "max_bytes": corpus.max_bytes,
    }
    if corpus.input is not None:
        where = f"data.{name}.input"
        inputs = [expanded(text, where) for text in _inputs(corpus)]
        return {"train": documents.files(inputs, **common)}
    assert corpus.dataset is not None
    dataset = expanded(corpus.dataset, f"data.{name}.dataset")
    splits = corpus.splits
    if splits is None:
        usual = {"train": "train", "val": "validation", "test": "test"}
        available = documents.dataset_splits(dataset, corpus.config)
        splits = {ours: theirs for ours, theirs in usual.items() if theirs in available}
    return {
        ours: documents.dataset(dataset, config=corpus.config, split=theirs, **common)
        for ours, theirs in splits.items()
    }


def expanded(text: str, where: str) -> str:
    """`text` with `$NAME` and `${NAME}` replaced from the environment; `UserError` if not set."""
    for name in re.findall(r"\$\{?(\w+)\}?", text):
        if name not in os.environ:
            raise UserError(
                f"{where}: the variable {name} is not set; set it, or give {where}=PATH"
            )
    return os.path.expandvars(text)
