"""The configuration of a fine-tuning run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparse_gpt.config import (
    CheckpointConfig,
    DataSource,
    DeepSpeedConfig,
    EvaluationConfig,
    Fraction,
    Kernel,
    LoggingConfig,
    OptimizerConfig,
    Positive,
    ScheduleConfig,
    Section,
)

Rate = Annotated[float, Field(gt=0.0)]
DEFAULT_LR = 1e-4


class FinetuneConfig(Section):
    """SPDF: sparse pretraining, then dense (or sparse, or gradual) fine-tuning.

    `checkpoint`: a run folder, a step folder, or a Hugging Face GPT-2 folder. `mode: dense` drops
    the masks and every weight learns; `sparse` keeps them, in masked or compact `storage`,
    whichever they were trained in. Optimizer and schedule start fresh.
    `gradual` is paper 003's sparse transfer: masks are kept; head, biases and LayerNorms train for
    `epochs` (default 1), then as long with the linear weights of one block more, from the last to
    the first, then as long with everything; the learning rate starts anew with each of these
    n_layer + 2 phases and falls linearly to 0. Head and token embedding are one matrix:
    `tied_embedding` says whether it trains from the start (head) or in the last phase (embedding).
    Validation is once an epoch unless `evaluation.every` says otherwise; the weights of the best
    validation are the ones tested.
    """

    name: str = "finetune"
    output_dir: Path | None = None
    seed: Annotated[int, Field(ge=0)] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    checkpoint: Path
    mode: Literal["dense", "sparse", "gradual"] = "dense"
    tied_embedding: Literal["head", "embedding"] = "head"
    storage: Literal["masked", "compact"] = "masked"
    kernel: Kernel = "auto"
    data: tuple[DataSource, ...]
    document_attention: bool = False
    seq_len: Positive | None = None  # default: the model's
    micro_batch_size: Positive = 8
    global_batch_size: Positive | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    max_steps: Positive | None = None
    dropout: Fraction | None = None  # default: the model's
    activation_checkpointing: bool = False

    lr_grid: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    keep_checkpoints: Literal["best", "all"] = "best"
    optimizer: OptimizerConfig = OptimizerConfig(lr=DEFAULT_LR)
    schedule: ScheduleConfig | None = None  # default: by mode, see `resolved_schedule`
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpointing: CheckpointConfig = CheckpointConfig(keep_last=1)
    evaluation: EvaluationConfig | None = None  # default: once an epoch, with patience 3
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "FinetuneConfig":
        if not self.data:
            raise ValueError("data: no corpus given; e.g. data: [{path: data/wikitext103}]")
        gradual = self.mode == "gradual"
        if gradual and self.max_steps is not None:
            raise ValueError("mode: gradual lasts n_layer + 2 times epochs; leave max_steps out")
        if not gradual and (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs, max_steps")
        if gradual and self.evaluation is not None and self.evaluation.patience is not None:
            raise ValueError(
                "mode: gradual must not stop before all blocks train; leave evaluation.patience "
                "out: the weights of the best validation are tested in any case"
            )
        if not gradual and self.tied_embedding != "head":
            raise ValueError("tied_embedding is of mode: gradual; leave it out")
        if gradual and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "mode: gradual steps groups of weights apart, which deepspeed.zero_stage 3 does "
                "not let us; set deepspeed.zero_stage: 2 or lower"
            )
        if self.lr_grid is not None:
            if self.optimizer.lr not in (DEFAULT_LR, OptimizerConfig().lr):  # as files have it
                raise ValueError("optimizer.lr and lr_grid are both given; leave one of them out")
            if len(set(self.lr_grid)) < len(self.lr_grid):
                raise ValueError("lr_grid: a learning rate is given twice")
        elif self.keep_checkpoints != "best":
            raise ValueError("keep_checkpoints is about the runs of an lr_grid, and there is none")
        if self.mode == "dense" and (self.storage, self.kernel) != ("masked", "auto"):
            raise ValueError(
                "storage and kernel are of sparse layers: set mode: sparse (or gradual)"
            )
        if self.kernel == "semi_structured":
            raise ValueError("kernel: semi_structured is of pretraining; set kernel: auto")
        if self.kernel.startswith("block_") and self.storage != "compact":
            raise ValueError(f"kernel: {self.kernel} needs storage: compact")
        if self.kernel == "masked" and self.storage != "masked":
            raise ValueError("kernel: masked needs storage: masked")
        return self

    @property
    def resolved_schedule(self) -> ScheduleConfig:
        """As given, else cosine with a warmup of 10 %; `gradual`: linear from the first step."""
        if self.schedule is not None:
            return self.schedule
        if self.mode == "gradual":
            return ScheduleConfig(type="linear", min_lr_ratio=0.0)
        return ScheduleConfig(warmup_fraction=0.1)

    @property
    def keeps_masks(self) -> bool:
        return self.mode != "dense"

    @property
    def run_dir(self) -> Path:
        return self.output_dir or Path("runs") / self.name
