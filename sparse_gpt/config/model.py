"""Sections of the model: its dense base, and the Sparse-IFT member that transforms it."""

from typing import Annotated, Literal

from pydantic import Field

from sparse_gpt.config.section import Fraction, Positive, Section
from sparse_gpt.model.gpt import MAX_LAYERS


class ModelConfig(Section):
    """The dense base model; `preset` gives the dimensions, single ones may be overridden.

    `loss_chunk`: logits and their gradient are made for so many tokens at a time. Those of a whole
    micro-batch take more memory than the blocks of a small model.
    """

    preset: str | None = None
    n_layer: Annotated[int, Field(gt=0, le=MAX_LAYERS)] | None = None
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
    loss_chunk: Positive | None = None  # tokens; none = a whole micro-batch
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
