"""Sections of sparsity: structure, distribution, schedule, and what each method has besides."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparse_gpt.config.init_mask import LotteryConfig, ScoringConfig, check_init_mask
from sparse_gpt.config.section import Fraction, Positive, Section
from sparse_gpt.ift.wide import exact


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
    def grouped(self) -> bool:
        """Whether there are groups that keep their number."""
        return self.type == "n_m" or self.balanced != "none"

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

    `dense_sparsity`: least sparsity of the dense phases after sparse ones (sparse decompression;
    the warm-up is dense). `reset_moments`: Adam's moments of sparse weights are zeroed at every
    switch.
    """

    warmup: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.10
    phase: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    last_dense: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.10
    last_sparse: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    dense_sparsity: Fraction = 0.0
    reset_moments: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ACDCConfig":
        parts = (self.warmup, self.phase, self.last_dense, self.last_sparse)
        if sum(map(exact, parts)) > 1:
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


Kernel = Literal["auto", "masked", "block_cpu", "block_triton", "semi_structured", "reference"]


class SparsityConfig(Section):
    """What is sparse, how much, and how the pattern moves.

    `distribution` shares the active weights out among the layers: the same share of each
    (`uniform`), Erdos-Renyi's, or what falls to them where the largest weights of the whole model
    stay (`global`): at the start, or as a method prunes. The first `dense_first` and last
    `dense_last` blocks stay dense, and layers that `layer_sparsity` names (a glob: a sparsity) have
    their own; the others make up for it, so that the number of active weights is always the uniform
    one's.

    `storage: masked` keeps dense weights with zeros, `compact` the values of active blocks alone,
    for methods whose layers keep their number of weights; `kernel` computes them. `growth_score`
    of RigL with compact storage: `exact`, the averaged dense gradient of the global batch, made in
    update steps; or `microbatch_norm`, the sum of each block's squared norms over micro-batches
    and ranks, for which no dense gradient is kept.
    """

    sparsity: Fraction = 0.0
    algorithm: Literal[
        "static", "set", "rigl", "gmp", "granet", "ac_dc", "top_kast", "search_spaces"
    ] = "static"
    structure: StructureConfig = StructureConfig()
    distribution: Literal["uniform", "erdos_renyi", "global"] = "uniform"
    dense_first: Annotated[int, Field(ge=0)] = 0
    dense_last: Annotated[int, Field(ge=0)] = 0
    layer_sparsity: dict[str, Fraction] = Field(default_factory=dict)
    drop_fraction: DropFractionConfig = DropFractionConfig()
    update: UpdateConfig = UpdateConfig()
    param_filter: tuple[str, ...] = PARAM_FILTER
    storage: Literal["masked", "compact"] = "masked"
    kernel: Kernel = "auto"
    growth_score: Literal["exact", "microbatch_norm"] = "exact"
    powerpropagation: Annotated[float, Field(ge=1.0)] = 1.0  # alpha of w = theta |theta|^(alpha-1)
    # What single methods need besides.
    gmp: GMPConfig = GMPConfig()
    granet: GraNetConfig = GraNetConfig()
    ac_dc: ACDCConfig = ACDCConfig()
    top_kast: TopKASTConfig = TopKASTConfig()
    search_spaces: SearchSpacesConfig = SearchSpacesConfig()
    # The first topology: drawn at random with the distribution's counts, or the best weights of
    # the model by a score, as many in all, which share themselves out among the layers.
    init_mask: Literal["random", "snip", "grasp", "force", "lottery"] = "random"
    scoring: ScoringConfig = ScoringConfig()
    lottery: LotteryConfig | None = None

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
        phased = self.algorithm == "ac_dc" and self.ac_dc.dense_sparsity
        if self.structure.grouped and (self.algorithm in ("gmp", "granet") or phased):
            raise ValueError(
                f"algorithm: {self.algorithm}: in this structure every group keeps its number, but "
                "the method has sets of other numbers; use static, set, rigl, ac_dc with "
                "dense_sparsity: 0, top_kast or search_spaces, or structure.type: unstructured or "
                "block without structure.balanced"
            )
        if self.update.mode == "replace" and self.algorithm not in ("set", "rigl"):
            raise ValueError(
                f"update.mode: replace is RigL's and SET's; {self.algorithm} updates its weights "
                "in every step: set update.mode: follow"
            )
        return self

    @model_validator(mode="after")
    def _check_init_mask(self) -> "SparsityConfig":
        check_init_mask(self)
        return self

    @model_validator(mode="after")
    def _check_storage(self) -> "SparsityConfig":
        compact = self.storage == "compact"
        if self.kernel in ("masked", "semi_structured", "block_cpu", "block_triton"):
            needed = "compact" if self.kernel.startswith("block_") else "masked"
            if self.storage != needed:
                raise ValueError(f"kernel: {self.kernel} needs storage: {needed}")
        if self.kernel == "semi_structured" and self.structure.n_m != (2, 4):
            raise ValueError("kernel: semi_structured needs structure: {type: n_m, n: 2, m: 4}")
        if self.growth_score != "exact" and not (compact and self.algorithm == "rigl"):
            raise ValueError(
                f"growth_score: {self.growth_score} is for algorithm: rigl with storage: compact"
            )
        if self.growth_score == "microbatch_norm" and self.structure.score == "max":
            raise ValueError("growth_score: microbatch_norm is of L2 norms; leave out score: max")
        if not compact:
            return self
        reasons = {
            f"algorithm: {self.algorithm} changes how many weights are stored": self.algorithm
            not in ("static", "set", "rigl"),
            "update.scope: model moves weights between layers": self.update.scope != "layer",
            "distribution: global finds the layers' numbers from weights": self.distribution
            == "global",
            f"init_mask: {self.init_mask} scores all weights first": self.init_mask != "random",
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ValueError(
                f"storage: compact keeps the active weights alone, as many in each layer all "
                f"along, but {reason}; set storage: masked (a checkpoint of one can go on with "
                "the other)"
            )
        return self

    @model_validator(mode="after")
    def _check_global(self) -> "SparsityConfig":
        if self.distribution != "global":
            return self
        if self.layer_sparsity or self.structure.balanced != "none":
            key = "layer_sparsity" if self.layer_sparsity else "structure.balanced"
            raise ValueError(
                f"{key} fixes numbers that distribution: global finds; leave one of them out"
            )
        if self.algorithm in ("gmp", "granet", "ac_dc") and self.update.scope != "model":
            raise ValueError(
                f"distribution: global and algorithm: {self.algorithm}, which prunes as it "
                "trains, need update.scope: model"
            )
        if self.algorithm == "top_kast" and self.update.scope != "model":
            raise ValueError(
                "distribution: global and algorithm: top_kast, whose trained set follows the "
                "numbers of the layers, need update.scope: model"
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
                f"distribution: {self.distribution}": self.distribution != "uniform",
                "dense_first": self.dense_first,
                "dense_last": self.dense_last,
                "layer_sparsity": self.layer_sparsity,
            }
            for key in (key for key, value in given.items() if value):
                raise ValueError(
                    f"{key} gives layers other sparsities, but every layer of structure {n}:{m} "
                    f"has {1 - n / m:.6g}; leave it out, and layers dense by param_filter"
                )
        if self.update.scope == "model" and structure.grouped:
            raise ValueError(
                "update.scope: model moves weights between layers, but in this structure every "
                "group keeps its number; set update.scope: layer"
            )
        return self
