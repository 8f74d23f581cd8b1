"""A results folder, read: the records of finished runs, the plan, and what the page says of it.

    <folder>/runs/<run>.json   one record a finished run (the only thing that must be there)
    <folder>/plan.json         optional: [{run, arm, label, seed, stage, group, stale}, ...]
    <folder>/experiment.json   optional: {title, question, baseline, compare, command}

A record that cannot be read, is of another schema or does not fit the others is refused by name and
the rest is shown: files may have come from another machine or another version. So is one that the
plan does not have, or of which it says that it is of another configuration.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator

from sparse_gpt.errors import UserError

LARGEST_FILE = 16 * 2**20  # bytes; a record has some 10 kB
Stage = Literal["pretrain", "finetune", "leaderboard"]
Count = Annotated[int, Field(ge=0, le=10**30)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63)]
Name = Annotated[str, Field(pattern=r"^[\w.+=-]{1,200}$")]


def _shown(text: str) -> str:
    """One line without control characters, which neither XML nor a table can hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _rate(text: str) -> str:
    if not 0 < float(text) < math.inf:  # float's own ValueError says what is no number
        raise ValueError(f"{text!r} is no learning rate")
    return text


Text = Annotated[str, Field(max_length=500), AfterValidator(_shown)]
# Not finite (or null) where a run diverged; it is counted, and left out of means.
Loss = Annotated[float, Field(allow_inf_nan=True)] | None


class _Part(BaseModel):
    """A part of a record; keys that this version does not know are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Model(_Part):
    n_layer: Annotated[int, Field(ge=1, le=10**6)]
    n_head: Annotated[int, Field(ge=1, le=10**6)]
    d_model: Annotated[int, Field(ge=1, le=10**9)]
    d_ff: Annotated[int, Field(ge=1, le=10**9)]
    d_embed: Annotated[int, Field(ge=1, le=10**9)] | None = None
    parameters: Count
    active_parameters: Count
    sparsity_nominal: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.0


class Flops(_Part):
    """Ratios are over the baseline arm's whole run."""

    spent: Finite
    per_sequence: Finite | None = None
    sparsified_layers_per_sequence: Finite | None = None
    ratio_layers: Finite | None = None
    ratio_model: Finite | None = None


class Losses(_Part):
    """A figure of the whole validation and test split; losses are nats a token."""

    val: Loss = None
    test: Loss = None


class SplitResult(_Part):
    loss: Loss = None
    token_perplexity: Loss = None
    word_perplexity: Loss = None


class Finetune(_Part):
    mode: Name
    lr: Finite
    lr_grid: dict[Annotated[str, AfterValidator(_rate)], Loss] | None = None
    epochs: Finite | None = None
    tested_step: Count | None = None
    stopped_early: bool | None = None
    optimizer: Text | None = None
    schedule: Text | None = None
    weights_outside_masks: Count | None = None
    weights_never_active: Count | None = None
    val: SplitResult | None = None
    test: SplitResult | None = None


class Score(_Part):
    score: Finite | None = None
    stderr: Finite | None = None


class Leaderboard(_Part):
    tasks: dict[str, Score]
    average: Score | None = None
    settings: dict[str, Any] = {}
    notes: list[Text] = []


Point = tuple[Count, Count, Finite, Loss]  # step, tokens, FLOPs spent, validation loss


class Record(_Part):
    """One finished run."""

    schema_version: Literal[1] = Field(alias="schema")
    experiment: Name
    run: Name
    arm: Name
    label: Text
    seed: Seed
    stage: Stage
    group: Text | None = None
    settings: dict[str, Any] = {}
    match: dict[str, Any] | None = None  # whose FLOPs the arm was given, and by what settings
    config_sha256: str | None = None
    config: dict[str, Any] = {}
    data: dict[str, Any] = {}
    git: Any = None
    versions: dict[str, Any] = {}
    device: Any = None
    threads: Count | None = None
    ranks: Count | None = None
    seconds: Finite | None = None
    started: Text | None = None
    finished: Text | None = None
    resumed: Count | None = None
    model: Model | None = None
    steps: Count | None = None
    tokens: Count | None = None
    topology_updates: Count | None = None
    flops: Flops | None = None
    loss: Losses | None = None
    word_perplexity: Losses | None = None
    curve: list[Point] = []
    finetune: Finetune | None = None
    leaderboard: Leaderboard | None = None

    @model_validator(mode="after")
    def _stage_has_its_part(self) -> "Record":
        if self.stage == "pretrain":
            needed = ("model", "flops", "loss", "tokens")
        else:
            needed = (self.stage,)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a record of stage {self.stage} needs {', '.join(missing)}")
        return self

    @property
    def mode(self) -> str:
        """How a fine-tuned model was fine-tuned; empty for other stages."""
        return self.finetune.mode if self.stage == "finetune" and self.finetune else ""

    def section(self, name: str) -> dict[str, Any]:
        """A section of the resolved configuration; empty where there is none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def final_loss(self, split: str) -> float | None:
        """The loss of this stage on `val` or `test`; None where not measured, or diverged."""
        if self.stage == "finetune" and self.finetune is not None:
            part = getattr(self.finetune, split)
            loss = part.loss if part else None
        else:
            loss = getattr(self.loss, split) if self.loss else None
        return loss if loss is not None and math.isfinite(loss) else None


class PlannedRun(_Part):
    run: Name
    arm: Name
    label: Text
    seed: Seed
    stage: Stage = "pretrain"
    group: Text | None = None
    stale: Annotated[str, AfterValidator(_shown)] | None = None  # why the record is of another run


class About(_Part):
    """What the experiment asks; texts for the page, and which arms are compared."""

    title: Text | None = None
    question: Text | None = None
    baseline: Name | None = None
    compare: list[tuple[Name, Name]] | None = None
    command: Text | None = None


@dataclass(frozen=True)
class Results:
    """Everything the page is made from."""

    name: str
    folder: Path
    about: About
    plan: list[PlannedRun] | None
    records: list[Record]
    refused: list[str]  # "<file>: why"

    @property
    def missing(self) -> list[PlannedRun]:
        """Planned runs without a record; empty without a plan."""
        there = {record.run for record in self.records}
        return [run for run in self.plan or [] if run.run not in there]


def read(folder: Path) -> Results:
    """Read a results folder. Raises `UserError` where there is none, or no plan and no record."""
    runs = folder / "runs"
    if not runs.is_dir() and not (folder / "plan.json").is_file():
        raise UserError(f"{folder} is no results folder: it has neither runs/ nor plan.json")
    refused: list[str] = []
    records: list[Record] = []
    for path in sorted(runs.glob("*.json")) if runs.is_dir() else []:
        try:
            record = Record.model_validate_json(_text(path))
            if record.run != path.stem:
                raise UserError(f"it calls itself {record.run!r}")
            records.append(record)
        except (ValidationError, UserError) as error:
            refused.append(f"{_shown(path.name)}: {_reason(error)}")
    about, plan = _read_about(folder, refused), _read_plan(folder, refused)
    name, records = _of_one_experiment(_of_the_plan(records, plan, refused), refused)
    return Results(name or folder.resolve().name, folder, about, plan, records, refused)


def checked(tree: dict[str, Any]) -> Record:
    """A record from what JSON held. Raises `UserError` saying which keys are not those of one."""
    try:
        return Record.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(_reason(error)) from None


def _of_one_experiment(records: list[Record], refused: list[str]) -> tuple[str, list[Record]]:
    """The records of the experiment that most belong to, one for each (arm, stage, mode, seed)."""
    if not records:
        return "", []
    name = Counter(record.experiment for record in records).most_common(1)[0][0]
    kept: dict[tuple[str, str, str, int], Record] = {}
    for record in records:
        key = (record.arm, record.stage, record.mode, record.seed)
        if record.experiment != name:
            refused.append(f"{record.run}.json: of experiment {record.experiment!r}, not {name!r}")
        elif key in kept:
            refused.append(f"{record.run}.json: the same arm, stage and seed as {kept[key].run}")
        else:
            kept[key] = record
    return name, list(kept.values())


def _of_the_plan(
    records: list[Record], plan: list[PlannedRun] | None, refused: list[str]
) -> list[Record]:
    """The records of what is planned now; all where there is no plan."""
    if plan is None:
        return records
    planned = {run.run: run for run in plan}
    kept = []
    for record in records:
        run = planned.get(record.run)
        if run is None:
            refused.append(f"{record.run}.json: not in the plan (an earlier configuration's?)")
        elif run.stale:
            refused.append(f"{record.run}.json: of another run than planned: {run.stale[:300]}")
        else:
            kept.append(record)
    return kept


def _read_about(folder: Path, refused: list[str]) -> About:
    path = folder / "experiment.json"
    if not path.is_file():
        return About()
    try:
        return About.model_validate_json(_text(path))
    except (ValidationError, UserError) as error:
        refused.append(f"{path.name}: {_reason(error)}")
        return About()


def _read_plan(folder: Path, refused: list[str]) -> list[PlannedRun] | None:
    path = folder / "plan.json"
    if not path.is_file():
        return None
    try:
        return TypeAdapter(list[PlannedRun]).validate_json(_text(path))
    except (ValidationError, UserError) as error:
        refused.append(f"{path.name}: {_reason(error)}")
        return None


def _text(path: Path) -> bytes:
    """The bytes of a regular file of a sane size."""
    try:
        if path.is_symlink() or not path.is_file():
            raise UserError("not a regular file")
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"larger than {LARGEST_FILE >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None


def _reason(error: ValidationError | UserError) -> str:
    if isinstance(error, UserError):
        return str(error)
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [
        ".".join(str(part) for part in problem["loc"]) + f": {problem['msg']}"
        if problem["loc"]
        else problem["msg"].removeprefix("Value error, ")
        for problem in problems[:3]
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return _shown("; ".join(lines) + more)[:400]
