"""The folder of one leaderboard run: a file a task, and what they all belong to.

    OUT/<model>.leaderboard/<key>/run.json          what is evaluated and how
                                  <task>.json       numbers of a finished lm-eval task
                                  <task>.answers.npz   log-likelihoods, also of an unfinished one

`key` is the beginning of the sha256 of what can change a number: the model's files, shots, limit,
dtype, device, scorer, lm-eval's and the other packages' versions. So another model or other
settings have another folder, and a start with the same ones goes on in the same folder with what
is missing. Batch size and number of threads are left out: they move log-likelihoods in the last
bits alone. The data is compared task by task.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from eval.leaderboard_tasks import LeaderboardTask
from eval.model_folder import ModelFolder
from sparse_gpt.durable import sha256_file, write_json
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_object

KEY_LENGTH = 12
HUB = "Hugging Face Hub"


def identity(folder: ModelFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run is: `settings`, and the digests of the model folder's files that are read."""
    files = sorted(
        path
        for path in folder.path.iterdir()
        if path.is_file() and (path.suffix in (".json", ".safetensors", ".model", ".txt"))
    )
    return {"settings": settings, "files": {path.name: sha256_file(path) for path in files}}


def data_sha256(task: LeaderboardTask, mirror: Path | None) -> str:
    """Digest of a mirror's files of one task, names and content; the Hub has none."""
    if mirror is None:
        return HUB
    digest = hashlib.sha256()
    root = mirror / task.folder
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


class RunFolder:
    """Reads and writes the files of one run; see the module."""

    def __init__(self, out: Path, folder: ModelFolder, what: dict[str, Any]) -> None:
        text = json.dumps(what, sort_keys=True)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        parent = out / f"{folder.file_name}.leaderboard"
        self.path = parent / self.sha256[:KEY_LENGTH]
        self._what = what
        self.new = not self.path.is_dir()
        self.others = sorted(p.name for p in parent.glob("*/run.json") if p.parent != self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def describe(self, model: dict[str, Any]) -> None:
        """Write run.json: what is evaluated, and what the loaded model is."""
        write_json(self.path / "run.json", {"sha256": self.sha256, **self._what, "model": model})

    def model(self) -> dict[str, Any]:
        """What `describe` was told of the model."""
        path = self.path / "run.json"
        model = _read(path).get("model")
        if not isinstance(model, dict):
            raise UserError(f"{path} says nothing of the model; remove its folder")
        return model

    def answers(self, name: str) -> Path:
        """The file of an lm-eval task's answers."""
        return self.path / f"{name}.answers.npz"

    def write(self, name: str, data: str, record: dict[str, Any]) -> None:
        """Keep the record of a finished lm-eval task."""
        record = {"task": name, "run_sha256": self.sha256, "data_sha256": data, **record}
        write_json(self.path / f"{name}.json", record)

    def read(self, name: str, data: str) -> dict[str, Any] | None:
        """The record of a task that is finished with this data; None if there is none."""
        path = self.path / f"{name}.json"
        if not path.is_file():
            return None
        record = _read(path)
        if record.get("run_sha256") != self.sha256:
            raise UserError(f"{path} belongs to another run; remove it, or choose another --out")
        if not {"data_sha256", "entry", "seconds"} <= record.keys():
            raise UserError(f"{path} is no record of a task; remove it to evaluate again")
        if record["data_sha256"] != data:
            print(f"{name}: the data has changed, so it is evaluated again", file=sys.stderr)
            return None
        return record


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it to evaluate again") from None
