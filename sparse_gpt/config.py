"""The run configuration: one frozen object. Names are the authors' own where they have one.

What DeepSpeed gets is derived from it in `train/engine.py`, never written by the user.
"""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The dense base model; `preset` gives the dimensions, single ones may be overridden."""

    preset: str | None = None
    n_layer: Positive | None = None
    n_head: Positive | None = None
    d_model: Positive | None = None
    d_ff: Positive | None = None
    d_embed: Positive | None = None  # width of the tied embedding; default: d_model, unprojected
    n_positions: Positive | None = None  # longest sequence; default: seq_len
    activation: Literal["gelu", "gelu_new"] = "gelu"
    dropout: Fraction = 0.0
    layer_norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    activation_checkpointing: bool = False
    compile: bool = False


class IFTConfig(Section):
    """The Sparse-IFT member that turns the base model into a sparse one of the same FLOPs.

    `wide` widens the model; `parallel`, `factorized`, `doped` and `low_rank` give the layers that
    `sparsity.param_filter` names another form (see `ift.forms`). `low_rank` has dense weights in a
    model `k_lr` times as wide. `non_linearity` is the sigma of these forms; relu is the paper's
    (section 3, App. C.2, there behind a BatchNorm). `sizes`: their branches or inner widths by
    layer (h.0.attn.q, ...), where they are not to be solved from the sparsity.

    `iso_flop: layer` keeps each sparsified layer's FLOPs (the papers' GPT rows). `model` makes the
    whole run cost what the dense model's costs (App. A.2): with `solve: sparsity` at the width of
    the nominal sparsity, by more sparsity; with `solve: width` at the nominal sparsity, by a
    smaller width. `head: dense` leaves the tied LM head dense at the wide width; `project` keeps
    embedding and head at the base model's width, with dense projections from it and to it.
    """

    member: Literal["none", "wide", "parallel", "factorized", "doped", "low_rank"] = "none"
    sparsity: Fraction | None = None  # default: sparsity.sparsity
    non_linearity: Literal["identity", "relu", "gelu"] | None = None  # default: relu
    k_lr: Annotated[float, Field(ge=1.0)] = 1.0
    keep_dense: tuple[str, ...] = ()  # layers of param_filter that stay plain and dense
    sizes: dict[str, Annotated[int, Field(ge=0)]] | None = None
    iso_flop: Literal["layer", "model"] = "layer"
    solve: Literal["sparsity", "width"] = "sparsity"
    heads: Literal["keep", "fixed_d_head"] = "keep"
    head: Literal["dense", "project"] = "dense"
    multiple_of: Positive | None = None  # widths that this many divide; default: the block


class StructureConfig(Section):
    """Shape of what is kept or dropped together, and which groups of it keep their number.

    `n_m`: n of each m weights along the input dimension; `transposable`: in every row and every
    column of each m x m tile, for the backward pass too. `balanced: row` keeps as many weights in
    every row, or blocks in every row of blocks.
    """

    type: Literal["unstructured", "block", "n_m"] = "unstructured"
    block: tuple[Positive, Positive] = (1, 1)  # b_out, b_in
    score: Literal["l2", "max"] = "l2"
    n: Positive | None = None
    m: Annotated[int, Field(ge=2, le=32)] | None = None  # sums over larger tiles could overflow
    transposable: bool = False
    balanced: Literal["none", "row"] = "none"

    @model_validator(mode="after")
    def _check(self) -> "StructureConfig":
        if self.type == "block" and self.block == (1, 1):
            raise ValueError("structure type block needs block: [b_out, b_in], e.g. [16, 16]")
        if self.type != "block" and self.block != (1, 1):
            raise ValueError(f"structure.block is set but type is {self.type}; set type: block")
        if self.type == "n_m":
            if self.n is None or self.m is None or self.n >= self.m:
                raise ValueError("structure type n_m needs n and m, n < m, e.g. n: 2, m: 4")
            if self.balanced != "none":
                raise ValueError("structure.balanced: n_m is balanced as it is; leave it out")
        elif self.n is not None or self.m is not None or self.transposable:
            raise ValueError(
                f"structure.n, m or transposable is set but type is {self.type}; set type: n_m"
            )
        return self

    @property
    def n_m(self) -> tuple[int, int] | None:
        """(n, m) of type n_m."""
        return None if self.n is None or self.m is None else (self.n, self.m)

    @property
    def divisors(self) -> tuple[int, int]:
        """What must divide the rows and the columns of a weight."""
        if self.m is None:
            return self.block
        return (self.m if self.transposable else 1), self.m


class DropFractionConfig(Section):
    """f(t) = init/2 (1 + cos(pi t / half_period)); half_period in steps, default update.stop."""

    type: Literal["cosine", "constant"] = "cosine"
    init: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    half_period: Positive | None = None


class UpdateConfig(Section):
    """When the topology changes.

    `stop`: a fraction of all steps, 0 < stop <= 1.0, or a whole number of steps. `mode: follow`
    updates after the optimizer step (the authors' GPT code); `replace`: instead of it (RigL as
    published). `scope: layer` compares the weights of a layer, whose number of active ones stays;
    `model` compares those of all sparse layers, and only their total stays.
    """

    freq: Positive = 100
    stop: Annotated[float, Field(gt=0.0)] | Positive = 0.75
    mode: Literal["follow", "replace"] = "follow"
    scope: Literal["layer", "model"] = "layer"

    @model_validator(mode="after")
    def _check(self) -> "UpdateConfig":
        if isinstance(self.stop, float) and self.stop > 1.0:
            raise ValueError(f"stop {self.stop}: a fraction is at most 1.0; steps are whole")
        if isinstance(self.stop, int) and self.stop == 1:
            raise ValueError("stop 1 is ambiguous: write 1.0 for the whole run, or 2 or more steps")
        return self


class GMPConfig(Section):
    """Gradual magnitude pruning: along a cubic from `initial_sparsity`, by `update.freq`/`stop`."""

    initial_sparsity: Fraction = 0.0


class GraNetConfig(Section):
    """GraNet: GMP's cubic with regrowth; the paper starts at half density."""

    initial_sparsity: Fraction = 0.5


class ACDCConfig(Section):
    """AC/DC's phases, as fractions of the run (FACTS section 5); `update` is not looked at.

    `dense_sparsity`: least sparsity of the dense phases (sparse decompression). `reset_moments`:
    Adam's moments of sparse weights are zeroed at every switch.
    """

    warmup: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.10
    phase: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    last_dense: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.10
    last_sparse: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    dense_sparsity: Fraction = 0.0
    reset_moments: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ACDCConfig":
        if self.warmup + self.phase + self.last_dense + self.last_sparse > 1.0:
            raise ValueError("warmup, phase, last_dense and last_sparse together are more than 1")
        return self


class TopKASTConfig(Section):
    """Top-KAST: sparsity of the backward set B, and strength of its L2 term."""

    backward_sparsity: Fraction = 0.0
    regulariser: Annotated[float, Field(ge=0.0)] = 1e-4


class SearchSpacesConfig(Section):
    """Algorithm 1 of "Search spaces": what keeps weights that do not take part from adding noise.

    `fix`: no rewiring after a fraction `v` of the run; `reset`: they become 0 every `z` steps;
    `regularize`: they lose `beta` of themselves a step. `update.freq` is how often the forward
    set is chosen anew (the paper: every step).
    """

    exploit: Literal["fix", "reset", "regularize"] = "reset"
    v: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    z: Positive = 1000
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 2e-4


PARAM_FILTER = (
    "h.*.attn.q.weight",
    "h.*.attn.k.weight",
    "h.*.attn.v.weight",
    "h.*.attn.o.weight",
    "h.*.mlp.fc1.weight",
    "h.*.mlp.fc2.weight",
)


class SparsityConfig(Section):
    """What is sparse, how much, and how the pattern moves.

    `distribution` shares the active weights out among the layers: the same share of each
    (`uniform`), or Erdos-Renyi's. The first `dense_first` and last `dense_last` blocks stay dense,
    and layers that `layer_sparsity` names (a glob: a sparsity) have their own; the others make up
    for it, so that the number of active weights is always the uniform one's.
    """

    sparsity: Fraction = 0.0
    algorithm: Literal[
        "static", "set", "rigl", "gmp", "granet", "ac_dc", "top_kast", "search_spaces"
    ] = "static"
    structure: StructureConfig = StructureConfig()
    distribution: Literal["uniform", "erdos_renyi"] = "uniform"
    dense_first: Annotated[int, Field(ge=0)] = 0
    dense_last: Annotated[int, Field(ge=0)] = 0
    layer_sparsity: dict[str, Fraction] = {}
    drop_fraction: DropFractionConfig = DropFractionConfig()
    update: UpdateConfig = UpdateConfig()
    param_filter: tuple[str, ...] = PARAM_FILTER
    storage: Literal["masked"] = "masked"
    kernel: Literal["auto", "masked", "reference"] = "auto"
    growth_score: Literal["exact"] = "exact"
    powerpropagation: Annotated[float, Field(ge=1.0)] = 1.0  # alpha of w = theta |theta|^(alpha-1)
    # What single methods need besides.
    gmp: GMPConfig = GMPConfig()
    granet: GraNetConfig = GraNetConfig()
    ac_dc: ACDCConfig = ACDCConfig()
    top_kast: TopKASTConfig = TopKASTConfig()
    search_spaces: SearchSpacesConfig = SearchSpacesConfig()

    @model_validator(mode="after")
    def _check_method(self) -> "SparsityConfig":
        for key in ("gmp", "granet", "ac_dc", "top_kast", "search_spaces"):
            section = getattr(self, key)
            if key != self.algorithm and section != type(section)():
                raise ValueError(f"{key} is set, but algorithm is {self.algorithm}")
        for name in ("gmp", "granet"):
            first = getattr(self, name).initial_sparsity
            if self.algorithm == name and first > self.sparsity:
                raise ValueError(
                    f"{name}.initial_sparsity {first} is more than sparsity {self.sparsity}"
                )
        for name, key in (("ac_dc", "dense_sparsity"), ("top_kast", "backward_sparsity")):
            larger = getattr(getattr(self, name), key)
            if self.algorithm == name and larger > self.sparsity:
                raise ValueError(f"{name}.{key} {larger} is more than sparsity {self.sparsity}")
        if self.powerpropagation != 1.0:
            grows = self.algorithm in ("set", "rigl", "granet", "ac_dc")
            if grows or (self.algorithm == "search_spaces" and self.search_spaces.exploit != "fix"):
                raise ValueError(
                    f"powerpropagation: weights that {self.algorithm} grows from 0, or sets to 0, "
                    "would have no gradient and stay there; use static, gmp, top_kast, or "
                    "search_spaces with exploit: fix"
                )
            if self.structure.type == "block":
                raise ValueError("powerpropagation: blocks are scored by parameters, not weights")
        grouped = self.structure.n_m is not None or self.structure.balanced != "none"
        phased = self.algorithm == "ac_dc" and self.ac_dc.dense_sparsity
        if grouped and (self.algorithm in ("gmp", "granet", "top_kast") or phased):
            raise ValueError(
                f"algorithm: {self.algorithm}: in this structure every group keeps its number, but "
                "the method has sets of other numbers; use static, set, rigl, ac_dc with "
                "dense_sparsity: 0 or search_spaces, or structure.type: unstructured or block"
            )
        if self.update.mode == "replace" and self.algorithm not in ("set", "rigl"):
            raise ValueError(
                f"update.mode: replace is RigL's and SET's; {self.algorithm} updates its weights "
                "in every step: set update.mode: follow"
            )
        return self

    @model_validator(mode="after")
    def _check_structure(self) -> "SparsityConfig":
        structure = self.structure
        if structure.n_m is not None:
            n, m = structure.n_m
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ValueError(
                    f"structure {n}:{m} has a sparsity of {1 - n / m:.6g}, not {self.sparsity}; "
                    "set sparsity.sparsity to it, or choose other n and m (0.5 is 2:4, 0.75 is "
                    "1:4 or 2:8)"
                )
            given = {
                "distribution: erdos_renyi": self.distribution != "uniform",
                "dense_first": self.dense_first,
                "dense_last": self.dense_last,
                "layer_sparsity": self.layer_sparsity,
            }
            for key in (key for key, value in given.items() if value):
                raise ValueError(
                    f"{key} gives layers other sparsities, but every layer of structure {n}:{m} "
                    f"has {1 - n / m:.6g}; leave it out, and layers dense by param_filter"
                )
        if self.update.scope == "model" and (structure.n_m or structure.balanced != "none"):
            raise ValueError(
                "update.scope: model moves weights between layers, but in this structure every "
                "group keeps its number; set update.scope: layer"
            )
        return self


class DataSource(Section):
    """A folder made by prepare_data, or a Megatron `.bin/.idx` prefix."""

    path: Path
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    # For Megatron files only, which say none of it:
    val_fraction: Fraction = 0.01  # documents held out
    vocab_size: Positive | None = None  # default: the largest id seen, plus one
    tokenizer: Path | None = None  # folder of the tokenizer they were made with


class OptimizerConfig(Section):
    """AdamW. Biases, LayerNorms and embeddings do not decay."""

    lr: Annotated[float, Field(gt=0.0)] = 6e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    grad_clip: Annotated[float, Field(ge=0.0)] = 1.0  # 0 = off
    max_nonfinite_steps: Positive = 10  # skipped steps in a row before the run ends


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
    """`resume: auto` goes on from the newest checkpoint, `required` insists, `never` starts new."""

    every: Positive | None = None  # steps; none = at the end only
    keep_last: Positive = 2
    resume: Literal["auto", "required", "never"] = "auto"
    allow_changed: tuple[str, ...] = ()  # config keys that may differ from the saved run's


class EvaluationConfig(Section):
    """Validation loss on the held-out split, every so many steps and at the end."""

    every: Positive | None = None
    sequences: Positive | None = None  # none = the whole split
    patience: Positive | None = None  # stop after so many validations without a new best


class LoggingConfig(Section):
    """JSONL and TensorBoard always; wandb where its extra is installed."""

    every: Positive = 10
    wandb: bool = False
    wandb_project: str = "sparse_gpt"


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
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # a device's, for MFU

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if not self.data:
            raise ValueError("data: no corpus given; e.g. data: [{path: data/novels}]")
        if (self.max_tokens is None) == (self.max_steps is None):
            raise ValueError("give exactly one of max_tokens, max_steps")
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
        return fraction_of_steps(s.warmup_fraction or 0.0, self.total_steps(world_size))

    def update_stop(self, world_size: int) -> int:
        """First step without topology updates: ceil of a fraction of all steps, or as given."""
        stop = self.sparsity.update.stop
        if isinstance(stop, float):
            return fraction_of_steps(stop, self.total_steps(world_size))
        return stop
