"""The run configuration: one frozen object."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparse_gpt.config.model import IFTConfig, ModelConfig
from sparse_gpt.config.section import Positive, Section
from sparse_gpt.config.sparsity import SparsityConfig
from sparse_gpt.config.training import (
    CheckpointConfig,
    DataSource,
    DeepSpeedConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    TimeoutsConfig,
    UnfreezingConfig,
)
from sparse_gpt.errors import UserError
from sparse_gpt.ift import FORMS, MEMBERS, Transform
from sparse_gpt.ift.forms import layer_of, solve_size
from sparse_gpt.ift.wide import exact, width_step
from sparse_gpt.model.flops import (
    fraction_of_steps,
    layer_shapes,
    linear_shapes,
    steps_for_tokens,
)
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.model.presets import preset


class RunConfig(Section):
    """Everything a pretraining run depends on."""

    name: str = "run"
    output_dir: Path | None = None  # default: runs/<name>
    seed: Annotated[int, Field(ge=0)] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    init_from: Path | None = None  # a Hugging Face GPT-2 folder to start from

    data: tuple[DataSource, ...] = ()
    document_attention: bool = False  # attention stops at document boundaries
    seq_len: Positive = 1024
    micro_batch_size: Positive = 8
    global_batch_size: Positive | None = None  # sequences; default: one micro-batch a rank
    max_tokens: Positive | None = None
    max_steps: Positive | None = None
    stop_at: Positive | None = None  # save and end after this step; a later start goes on

    model: ModelConfig = ModelConfig()
    ift: IFTConfig = IFTConfig()
    sparsity: SparsityConfig = SparsityConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    unfreezing: UnfreezingConfig | None = None  # none = everything trains from step 1
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # a device's, for MFU

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if not self.data:
            raise ValueError("data: no corpus given; e.g. data: [{path: data/novels}]")
        if (self.max_tokens is None) == (self.max_steps is None):
            raise ValueError("give exactly one of max_tokens, max_steps")
        if self.evaluation.patience and self.sparsity.algorithm in ("gmp", "granet", "ac_dc"):
            raise ValueError(
                f"evaluation.patience: {self.sparsity.algorithm} is not at its sparsity before its "
                "last update, and the best loss may be that of a denser model; set it to null"
            )
        if self.precision == "bf16" and self.deepspeed.zero_stage == 0:
            raise ValueError(
                "precision: bf16 needs fp32 master weights, which deepspeed.zero_stage 0 has not; "
                "set deepspeed.zero_stage: 1 (or higher) or precision: fp32"
            )
        if self.global_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.model.n_positions and self.seq_len > self.model.n_positions:
            raise ValueError(
                f"seq_len {self.seq_len} is longer than model.n_positions {self.model.n_positions}"
            )
        if self.sparsity.algorithm == "top_kast" and self.optimizer.weight_decay:
            raise ValueError(
                "sparsity.algorithm: top_kast regularises by sparsity.top_kast.regulariser, and "
                "weight decay would move weights it does not train; set optimizer.weight_decay: 0"
            )
        grows = self.sparsity.algorithm in ("set", "rigl", "granet")
        if self.optimizer.growth == "smet" and not (grows and self.sparsity.sparsity):
            raise ValueError(
                "optimizer.growth: smet is for weights that grow from 0, by sparsity.algorithm: "
                f"set, rigl or granet; with {self.sparsity.algorithm} at sparsity "
                f"{self.sparsity.sparsity} none do: set optimizer.growth: global_step"
            )
        if self.optimizer.growth == "smet" and self.sparsity.storage == "compact":
            raise ValueError(
                "optimizer.growth: smet needs sparsity.storage: masked; set it, or set "
                "optimizer.growth: global_step"
            )
        if self.unfreezing is not None and self.sparsity.algorithm != "static":
            raise ValueError(
                "unfreezing keeps masks as they are, and sparsity.algorithm: "
                f"{self.sparsity.algorithm} moves them; set sparsity.algorithm: static or leave "
                "unfreezing out"
            )
        if self.unfreezing is not None and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "unfreezing steps groups of weights apart, which deepspeed.zero_stage 3 does not "
                "let us; set deepspeed.zero_stage: 2 or lower"
            )
        lottery = self.sparsity.lottery
        if self.init_from is not None and lottery is not None and lottery.rewind is not None:
            raise ValueError(
                "init_from and sparsity.lottery.rewind both say where the weights come from; leave "
                "one of them out"
            )
        _ = self.dims
        self._check_ift()
        self._check_iso_flop()
        if self.ift.solve == "width":
            self._check_width_step()
        else:
            self._check_blocks()
        return self

    def _check_ift(self) -> None:
        ift, changes_form = self.ift, self.ift.member in FORMS
        for key in ("non_linearity", "sizes"):
            if getattr(ift, key) is not None and not changes_form:
                raise ValueError(
                    f"ift.{key}: member {ift.member} has layers of the plain form; leave it out, "
                    f"or set ift.member to one of {', '.join(FORMS)}"
                )
        if ift.k_lr != 1.0 and ift.member != "low_rank":
            raise ValueError(f"ift.k_lr: for member low_rank alone, not {ift.member}; leave it out")
        if ift.member == "low_rank" and (self.sparsity.sparsity or ift.sparsity):
            raise ValueError(
                "ift.member: low_rank has dense weights; set sparsity.sparsity: 0 and choose the "
                "width with ift.k_lr (Sparse Wide's is sqrt(1 / (1 - s)))"
            )
        layers = layer_shapes(self.dims)
        for glob in ift.keep_dense:
            if not any(fnmatchcase(f"{layer}.weight", glob) for layer in layers):
                raise ValueError(
                    f"ift.keep_dense: {glob} matches no layer; layers are "
                    "h.<i>.attn.{q,k,v,o}.weight and h.<i>.mlp.{fc1,fc2}.weight"
                )
        for layer in (ift.sizes or {}).keys() - layers.keys():
            raise ValueError(f"ift.sizes: {layer} is no layer; layers are h.0.attn.q, ...")
        _ = self.transform

    def _check_iso_flop(self) -> None:
        ift, sparsity = self.ift, self.sparsity
        if ift.head == "project" and ift.member not in ("wide", "low_rank"):
            raise ValueError(
                f"ift.head: project keeps the embedding narrower than a widened model; "
                f"ift.member: {ift.member} widens nothing: set ift.member: wide or ift.head: dense"
            )
        if sparsity.layer_sparsity and sparsity.sparsity == 0.0:
            raise ValueError(
                "sparsity.layer_sparsity shares out what sparsity.sparsity: 0 does not leave out; "
                "set sparsity.sparsity, or param_filter for single layers"
            )
        if ift.iso_flop == "layer":
            if ift.solve == "width":
                raise ValueError("ift.solve: width needs ift.iso_flop: model")
            return
        if ift.member in ("none", "low_rank"):
            raise ValueError(
                f"ift.iso_flop: model solves for a sparsity, and ift.member: {ift.member} has "
                "none; set another member, e.g. wide"
            )
        if ift.sparsity not in (None, sparsity.sparsity):
            raise ValueError(
                f"ift.sparsity {ift.sparsity} and sparsity.sparsity {sparsity.sparsity} differ, "
                "and ift.iso_flop: model solves for the sparsity; set sparsity.sparsity alone"
            )
        if ift.solve == "sparsity" and sparsity.structure.type == "n_m":
            raise ValueError(
                "ift.iso_flop: model solves for a sparsity, and n_m has one that is given; set "
                "ift.solve: width"
            )
        if ift.solve == "width" and ift.member != "wide":
            raise ValueError("ift.solve: width needs ift.member: wide")
        if self.max_tokens is not None and self.global_batch_size is None:
            raise ValueError(
                "ift.iso_flop: model needs global_batch_size where max_tokens is given: the steps "
                "of the run, and what they cost, must not depend on the number of ranks"
            )

    def _check_width_step(self) -> None:
        """The widths come from the solver, which tries multiples of a step."""
        step = width_step(self.base_dims, self.ift.heads, self.width_multiple)
        divisor = math.lcm(*self.sparsity.structure.divisors)
        if step % divisor:
            raise ValueError(
                f"ift.multiple_of: {self.ift.multiple_of} gives widths in steps of {step}, which "
                f"sparsity.structure needs {divisor} to divide; set ift.multiple_of: {divisor}"
            )

    def _check_blocks(self) -> None:
        structure = self.sparsity.structure
        d_out, d_in = structure.divisors
        d, f = self.dims["d_model"], self.dims["d_ff"]
        is_n_m = structure.type == "n_m"
        key, other = ("m", "n and m") if is_n_m else ("block", "block")
        advice = f"choose another {other}, or set ift.multiple_of: {math.lcm(d_out, d_in)}"
        for width_key, width in (("d_model", d), ("d_ff", f)):
            for axis, size in (("b_out", d_out), ("b_in", d_in)):
                if width % size:
                    raise ValueError(
                        f"sparsity.structure.{key}: {'m' if is_n_m else axis} {size} does not "
                        f"divide {width_key} {width} (of the model as trained); {advice}"
                    )
        for name, (out, inner) in linear_shapes(self.dims, self.transform).items():
            if out % d_out or inner % d_in:
                raise ValueError(
                    f"sparsity.structure.{key}: {d_out} x {d_in} does not divide {name} "
                    f"({out} x {inner}); {advice}"
                )

    @property
    def base_dims(self) -> dict[str, int]:
        """`n_layer, n_head, d_model, d_ff` of the dense base model, and `d_embed` if it has one."""
        dims: dict[str, int] = dict(preset(self.model.preset)) if self.model.preset else {}
        for key in ("n_layer", "n_head", "d_model", "d_ff"):
            value = getattr(self.model, key)
            if value is not None:
                dims[key] = value
        if self.model.d_embed is not None:
            dims["d_embed"] = self.model.d_embed
        if "d_ff" not in dims and "d_model" in dims:
            dims["d_ff"] = 4 * dims["d_model"]
        missing = [key for key in ("n_layer", "n_head", "d_model") if key not in dims]
        if missing:
            raise ValueError(f"model: set preset, or {', '.join(missing)}")
        if dims["d_model"] % dims["n_head"]:
            raise ValueError(
                f"model.d_model {dims['d_model']} is not divisible by model.n_head {dims['n_head']}"
            )
        return dims

    @property
    def dims(self) -> dict[str, int]:
        """The dimensions of the model as trained, after the Sparse-IFT member.

        With `ift.solve: width` they are those that `sparse_units.solve` begins from.
        """
        if self.ift.member == "none":
            return self.base_dims
        sparsity = exact(self.ift_sparsity)
        if self.ift.member == "low_rank":  # as wide as Sparse Wide with k_sw = k_lr
            sparsity = 1 - 1 / exact(self.ift.k_lr) ** 2
        widen = MEMBERS[self.ift.member]
        return self.projected(
            widen(self.base_dims, sparsity, heads=self.ift.heads, multiple_of=self.width_multiple)
        )

    def projected(self, dims: dict[str, int]) -> dict[str, int]:
        """Dimensions with what `ift.head` says of the embedding; as they are at the base width."""
        base = self.base_dims
        if self.ift.head == "dense" or dims["d_model"] == base["d_model"]:
            return dims
        return {"d_embed": base["d_model"], **dims}

    @property
    def block_size(self) -> int:
        """Weights in a block, the unit that is kept or dropped."""
        return math.prod(self.sparsity.structure.block)

    @property
    def ift_sparsity(self) -> float:
        """The sparsity that the member's sizes are solved from."""
        return self.sparsity.sparsity if self.ift.sparsity is None else self.ift.sparsity

    def in_dense_block(self, name: str) -> bool:
        """Whether `dense_first` or `dense_last` keeps the block of a layer or weight dense."""
        last = self.base_dims["n_layer"] - self.sparsity.dense_last
        return not self.sparsity.dense_first <= int(name.split(".")[1]) < last

    def names_layer(self, weight: str) -> bool:
        """Whether `sparsity.param_filter` chooses a weight and `ift.keep_dense` does not.

        A weight of a transformed layer is chosen by the plain weight's name, or by its own.
        """
        names = {weight, f"{layer_of(weight)}.weight"}

        def any_of(globs: tuple[str, ...]) -> bool:
            return any(fnmatchcase(name, glob) for name in names for glob in globs)

        return any_of(self.sparsity.param_filter) and not any_of(self.ift.keep_dense)

    @property
    def transform(self) -> Transform | None:
        """Which layers the member gives another form; None for `none` and `wide`."""
        if self.ift.member not in FORMS:
            return None
        sizes = self.ift.sizes
        if sizes is None:
            base = layer_shapes(self.base_dims)
            sizes = {
                layer: solve_size(
                    self.ift.member,
                    self.ift_sparsity,
                    shape,
                    base[layer],
                    self.width_multiple or 1,
                )
                for layer, shape in layer_shapes(self.dims).items()
                if self.names_layer(f"{layer}.weight") and not self.in_dense_block(layer)
            }
        return Transform(self.ift.member, self.ift.non_linearity or "relu", sizes)

    @property
    def width_multiple(self) -> int | None:
        """What the widened widths are a multiple of besides the heads; None where nothing."""
        multiple = self.ift.multiple_of or math.lcm(*self.sparsity.structure.divisors)
        return None if multiple == 1 else multiple

    def gpt_config(self, vocab_size: int, dims: dict[str, int] | None = None) -> GPTConfig:
        """The model as trained, for a vocabulary; `dims` where they were solved for."""
        return GPTConfig(
            **(dims or self.dims),
            vocab_size=vocab_size,
            n_positions=self.model.n_positions or self.seq_len,
            activation=self.model.activation,
            dropout=self.model.dropout,
            layer_norm_epsilon=self.model.layer_norm_epsilon,
            init_std=self.model.init_std,
            activation_checkpointing=self.model.activation_checkpointing,
            loss_chunk=self.model.loss_chunk,
            transform=self.transform,
        )

    @property
    def run_dir(self) -> Path:
        return self.output_dir or Path("runs") / self.name

    def batch(self, world_size: int) -> int:
        """Sequences in one optimizer step."""
        return self.global_batch_size or self.micro_batch_size * world_size

    def accumulation(self, world_size: int) -> int:
        """Micro-batches a rank accumulates in one optimizer step."""
        batch, per_pass = self.batch(world_size), self.micro_batch_size * world_size
        if batch % per_pass:
            raise UserError(
                f"global_batch_size {batch} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {world_size} ranks"
            )
        return batch // per_pass

    def total_steps(self, world_size: int) -> int:
        """Optimizer steps of the whole run: ceil(max_tokens / tokens a step)."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return steps_for_tokens(self.max_tokens, self.batch(world_size), self.seq_len)

    def warmup_steps(self, world_size: int) -> int:
        """Optimizer steps of the linear warmup."""
        s = self.schedule
        if s.warmup_steps is not None:
            return s.warmup_steps
        if s.warmup_tokens is not None:
            return steps_for_tokens(s.warmup_tokens, self.batch(world_size), self.seq_len)
        return fraction_of_steps(s.warmup_fraction or 0.0, self.schedule_steps(world_size))

    def schedule_steps(self, world_size: int) -> int:
        """Steps after which the learning rate starts anew: a phase of unfreezing, or the run."""
        if self.unfreezing is not None:
            return self.unfreezing.every
        return self.total_steps(world_size)

    def update_stop(self, world_size: int) -> int:
        """First step without topology updates: ceil of a fraction of all steps, or as given."""
        stop = self.sparsity.update.stop
        if isinstance(stop, float):
            return fraction_of_steps(stop, self.total_steps(world_size))
        return stop
