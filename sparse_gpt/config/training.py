"""Sections of training: data, optimizer, schedule, DeepSpeed, checkpoints, logs."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sparse_gpt.config.section import Fraction, Positive, Section


class DataSource(Section):
    """A folder made by prepare_data, or a Megatron `.bin/.idx` prefix."""

    path: Path
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    # For Megatron files only, which say none of it:
    val_fraction: Fraction = 0.01  # documents held out
    vocab_size: Positive | None = None  # default: the largest id seen, plus one
    tokenizer: Path | None = None  # folder of the tokenizer they were made with


SMET_WARMUP = 50
ROLLBACKS = 3


class OptimizerConfig(Section):
    """AdamW. Biases, LayerNorms and embeddings do not decay.

    `on_nonfinite`: what follows `max_nonfinite_steps` steps in a row whose loss or gradient is not
    finite, none of which changes anything. `rollback`: the last checkpoint is loaded, and the data
    since is skipped: the run goes on with the batch after the last bad one; at most
    `max_rollbacks` times.

    `growth`: how weights that a topology update grew are stepped, always from zero moments.
    `global_step`: by the step count of the run (the papers). `smet`: each by a count of its own,
    its learning rate warmed up over `smet_warmup` steps, and that of all sparse layers divided by
    their density.
    """

    lr: Annotated[float, Field(gt=0.0)] = 6e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0  # 0 = off
    max_nonfinite_steps: Positive = 10  # skipped steps in a row, then `on_nonfinite`
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    max_rollbacks: Positive = ROLLBACKS
    growth: Literal["global_step", "smet"] = "global_step"
    smet_warmup: Positive = SMET_WARMUP

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.growth != "smet" and self.smet_warmup != SMET_WARMUP:
            raise ValueError(f"smet_warmup is set, but growth is {self.growth}, not smet")
        if self.on_nonfinite == "stop" and self.max_rollbacks != ROLLBACKS:
            raise ValueError("max_rollbacks is set, but on_nonfinite is stop, not rollback")
        return self


class ScheduleConfig(Section):
    """Learning rate over tokens: linear warmup, then cosine, linear or constant; or WSD.

    At most one of `warmup_tokens`, `warmup_steps`, `warmup_fraction`. WSD holds the peak and
    decays linearly over the last `decay_fraction` of all steps.
    """

    type: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_tokens: Annotated[int, Field(ge=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_fraction: Fraction | None = None
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        given = [
            key
            for key in ("warmup_tokens", "warmup_steps", "warmup_fraction")
            if getattr(self, key) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}, not {len(given)}")
        return self


class UnfreezingConfig(Section):
    """Gradual unfreezing (paper 003, section 4.3): see `train.unfreezing` for what trains when.

    `every`: steps of a phase. Learning rate and warmup start anew with each.
    """

    every: Positive
    tied_embedding: Literal["head", "embedding"] = "head"


class DeepSpeedConfig(Section):
    """ZeRO, as DeepSpeed names it. Buckets are in elements.

    `communication_data_type`: what gradients are averaged in. bf16 halves their traffic, and
    their sum then depends on the number of ranks, and with it which weights RigL grows.
    """

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    offload_optimizer: Literal["none", "cpu"] = "none"
    reduce_bucket_size: Positive = 50_000_000
    allgather_bucket_size: Positive = 50_000_000
    overlap_comm: bool = True
    communication_data_type: Literal["fp32", "bf16"] = "fp32"
    param_persistence_threshold: Annotated[int, Field(ge=0)] = 10_000


class CheckpointConfig(Section):
    """`resume: auto` goes on from the newest checkpoint, `required` insists, `never` starts new.

    `deadline`: stop and save before it: minutes from the start of the command, an ISO time (local
    where it has no offset), or `slurm`: the end of the job's time. `deadline_margin`: minutes kept
    for the last step, its validation and the save.
    """

    every: Positive | None = None  # steps; none = at the end only
    keep_last: Positive = 2
    resume: Literal["auto", "required", "never"] = "auto"
    allow_changed: tuple[str, ...] = ()  # config keys that may differ from the saved run's
    deadline: Annotated[float, Field(gt=0.0)] | str | None = None
    deadline_margin: Annotated[float, Field(ge=0.0)] = 2.0

    @field_validator("deadline")
    @classmethod
    def _check_time(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, str) and value != "slurm":
            try:
                datetime.fromisoformat(value).timestamp()
            except (ValueError, OverflowError):
                raise ValueError(
                    f"{value!r} is neither minutes nor slurm, nor an ISO time such as "
                    "2026-05-01T18:00+02:00"
                ) from None
        return value

    @model_validator(mode="after")
    def _check_margin(self) -> "CheckpointConfig":
        if isinstance(self.deadline, float) and self.deadline <= self.deadline_margin:
            raise ValueError(
                f"deadline: {self.deadline:g} minutes are all kept for the last save; lower "
                f"deadline_margin ({self.deadline_margin:g} minutes), or give more"
            )
        return self


class TimeoutsConfig(Section):
    """Seconds after which ranks that wait for another one end, and name it.

    `exchange`: a single exchange between ranks, and the start of all of them. `progress`: a
    micro-step, an optimizer step with its topology update, a batch of validation, or a file of a
    checkpoint.
    `silence`: a rank whose node gives no sign of life.
    """

    exchange: Annotated[float, Field(gt=0.0)] = 1800.0
    progress: Annotated[float, Field(gt=0.0)] = 1200.0
    silence: Annotated[float, Field(ge=2.0)] = 60.0

    @model_validator(mode="after")
    def _check(self) -> "TimeoutsConfig":
        if self.progress >= self.exchange:
            raise ValueError(
                f"progress {self.progress:g} must be shorter than exchange {self.exchange:g}: what "
                "is stuck is found while the others still wait"
            )
        return self


class EvaluationConfig(Section):
    """Validation loss on the held-out split, every so many steps and at the end.

    `final`: after the last step, the loss over the whole of val and test, in `results.json`.
    """

    every: Positive | None = None
    sequences: Positive | None = None  # none = the whole split
    final: bool = False
    patience: Positive | None = None  # stop after so many validations without a new best


class LoggingConfig(Section):
    """JSONL and TensorBoard always; wandb where its extra is installed."""

    every: Positive = 10
    wandb: bool = False
    wandb_project: str = "sparse_gpt"
