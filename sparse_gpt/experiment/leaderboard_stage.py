"""The leaderboard as a stage of an experiment: export what was trained, evaluate it, keep it.

The evaluation is a process of its own, on the cores that it inherits: it imports libraries that
read the environment once, and a kill of it loses the answers of the last half minute alone.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparse_gpt.config import Positive, Section
from sparse_gpt.errors import UserError
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.json_file import read_object

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "leaderboard.py"
KEPT = ("tasks", "average", "settings", "notes", "versions", "run_sha256", "seconds")


class LeaderboardStage(Section):
    """`stages: [{leaderboard: {...}}]`; the keys are options of eval/leaderboard.py.

    `data`: a mirror of the data sets, where `$NAME` stands for a variable of the environment;
    None for the Hub. `arms`: default, those of group main.
    """

    arms: tuple[str, ...] | None = None
    data: str | None = None
    shots: Literal["leaderboard", "zero"] = "leaderboard"
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    limit: Positive | None = None
    batch_size: Positive | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def arguments(self) -> list[str]:
        """Of eval/leaderboard.py, without the model and the folder of results."""
        given = ["--shots", self.shots, "--device", self.device, "--dtype", self.dtype]
        given += ["--batch-size", str(self.batch_size)]
        if self.data is not None:
            expanded = os.path.expandvars(self.data)
            if "$" in expanded:
                raise UserError(f"stages: leaderboard.data: {self.data}: a variable is not set")
            given += ["--data", expanded]
        if self.tasks is not None:
            given += ["--tasks", *self.tasks]
        return given + ([] if self.limit is None else ["--limit", str(self.limit)])


def evaluate(run: Path, name: str, out: Path, stage: LeaderboardStage) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run; returns the `leaderboard` part of its record.

    run: folder of a pretraining or fine-tuning run. out: gets the exported model (`hf`), the log
    and the files of the evaluation, of the name `name`; a second call goes on with what the first
    left there. Raises `UserError` with the end of the log where the evaluation fails.
    """
    arguments = stage.arguments()
    out.mkdir(parents=True, exist_ok=True)
    export_checkpoint(run, out / "hf", "float32", overwrite=True)
    command = [sys.executable, str(SCRIPT), f"{name}={out / 'hf'}", *arguments, "--out", str(out)]
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, check=False).returncode
    if code:
        tail = (out / "log.txt").read_text(encoding="utf-8").splitlines()[-12:]
        raise UserError(
            f"{name}: the leaderboard's evaluation ended with {code}:\n" + "\n".join(tail)
        )
    return part(read_object(out / f"{name}.leaderboard.json"))


def part(result: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of a result file of eval/leaderboard.py: all but the model."""
    return {key: result[key] for key in KEPT}
