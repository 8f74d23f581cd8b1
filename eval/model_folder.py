"""A Hugging Face model folder: what must be in it, and what a result records about it.

Nothing here but `exported` imports torch, so bad input is refused before anything is loaded.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json
from sparse_gpt.model_files import PICKLES, refuse_code

METADATA_FILE = "sparse_gpt.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


@dataclass(frozen=True)
class ModelFolder:
    """One folder to evaluate, checked: `path` is absolute, `name` labels its row in a table."""

    path: Path
    name: str
    config: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What a result file says about the model.

        Keys: `name`, `folder`, `config_sha256` (of the bytes of config.json), `model_type`,
        `n_positions`, `vocab_size` and `sparse_gpt` (the exporter's metadata, or None).
        """
        return {
            "name": self.name,
            "folder": str(self.path),
            "config_sha256": hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest(),
            "model_type": self.config.get("model_type"),
            "n_positions": self.config.get("n_positions"),
            "vocab_size": self.config.get("vocab_size"),
            "sparse_gpt": self.metadata(),
        }

    def metadata(self) -> dict[str, Any] | None:
        """The content of sparse_gpt.json, which `launch/export_hf.py` writes; None without it."""
        path = self.path / METADATA_FILE
        return _read_json(path) if path.is_file() else None

    @property
    def file_name(self) -> str:
        """The name as a file name, without an ending."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "model"


def open_folders(arguments: list[str]) -> list[ModelFolder]:
    """Check `FOLDER` or `NAME=FOLDER` arguments.

    Names not given are the shortest ends of the paths that differ (`dense/hf`, `sparse/hf`).
    Raises `UserError` for a folder without config.json, weights in safetensors or a tokenizer,
    and for two folders of one name.
    """
    named = [_split(argument) for argument in arguments]
    configs = [_check(path) for _, path in named]
    paths = [path.resolve() for _, path in named]
    if len(set(paths)) != len(paths):
        raise UserError("the same model folder is given twice")
    folders = [
        ModelFolder(path, name or label, config)
        for (name, _), label, path, config in zip(named, _labels(paths), paths, configs)
    ]
    files = [folder.file_name for folder in folders]
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"two model folders are named {file!r}: name them as NAME=FOLDER")
    return folders


def exported(argument: str, out: Path) -> str:
    """The same for a run's folder: its newest checkpoint, exported to `out/<name>.hf`.

    Anything else is given back as it is. Raises `UserError` for a broken checkpoint.
    """
    name, path = _split(argument)
    if not (path / "checkpoints").is_dir():
        return argument
    from sparse_gpt.hf.checkpoint import export_checkpoint

    name = name or path.resolve().name
    folder = out / f"{name}.hf"
    export_checkpoint(path, folder, "float32", overwrite=True)
    return f"{name}={folder}"


def _split(argument: str) -> tuple[str | None, Path]:
    """`NAME=FOLDER`, or `FOLDER` alone."""
    name, separator, rest = argument.partition("=")
    if separator and name and not Path(argument).exists():
        return name, Path(rest)
    return None, Path(argument)


def check_tokenizer(folder: ModelFolder, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids the model has no embedding for.

    A padding token that lm-eval adds to a tokenizer without one is never scored and passes.
    """
    largest = max(tokenizer.get_vocab().values())
    size = folder.config.get("vocab_size")
    if isinstance(size, int) and largest >= size and largest != tokenizer.pad_token_id:
        raise UserError(
            f"{folder.path}: the tokenizer has ids up to {largest}, vocab_size in config.json "
            f"is {size}: this tokenizer does not belong to this model"
        )


def _check(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"model folder not found: {path}")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is no Hugging Face model folder: it has no config.json "
            "(make one from a checkpoint with launch/export_hf.py)"
        )
    config = _read_json(path / "config.json")
    refuse_code(path)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / name).is_file() for name in weights):
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        extra = f"; {pickled[0]} is a pickle and is not loaded" if pickled else ""
        raise UserError(f"{path} has no weights: expected {' or '.join(weights)}{extra}")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)}; "
            "copy the training tokenizer's files into the folder"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path, unique=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _labels(paths: list[Path]) -> list[str]:
    """The shortest trailing part of each path, of one length for all, that tells them apart."""
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        labels = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
