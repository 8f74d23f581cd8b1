"""The training run behind a fine-tuning."""

import math

from sparse_gpt.config import (
    EvaluationConfig,
    IFTConfig,
    ModelConfig,
    RunConfig,
    SparsityConfig,
    StructureConfig,
    UnfreezingConfig,
    UpdateConfig,
)
from sparse_gpt.config_file import construct
from sparse_gpt.errors import UserError
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.ift import Transform
from sparse_gpt.train.build import WeightSource, open_sources
from sparse_gpt.train.unfreezing import phases


def run_config(config: FinetuneConfig, source: WeightSource, world_size: int) -> RunConfig:
    """The training run behind a fine-tuning: the source's model, static masks or none."""
    gpt = source.gpt_config
    seq_len = config.seq_len or gpt.n_positions
    if seq_len > gpt.n_positions:
        raise UserError(
            f"seq_len {seq_len} is longer than the {gpt.n_positions} positions of the checkpoint"
        )
    batch = config.global_batch_size or config.micro_batch_size * world_size
    steps_per_epoch = max(1, math.ceil(sequences_per_epoch(config, seq_len) / batch))
    steps = config.max_steps or math.ceil((config.epochs or 1.0) * steps_per_epoch)
    unfreezing = None
    if config.mode == "gradual":
        tied = config.tied_embedding
        unfreezing = UnfreezingConfig(every=steps, tied_embedding=tied)
        steps *= phases(gpt.n_layer)
    layers = source.layers if config.keeps_masks else {}
    kept = [layer.active_weights / layer.weights for layer in layers.values()]
    structure = StructureConfig()
    for block in {layer.block for layer in layers.values()} - {(1, 1)}:
        structure = StructureConfig(type="block", block=block)
    sparsity = construct(
        SparsityConfig,
        "fine-tuning",
        sparsity=max(1e-9, 1 - sum(kept) / len(kept)) if kept else 0.0,
        algorithm="static",
        structure=structure,
        param_filter=tuple(layers) or SparsityConfig().param_filter,
        update=UpdateConfig(),
        storage=config.storage,
        kernel=config.kernel,
    )
    return construct(
        RunConfig,
        "fine-tuning",
        name=config.name,
        output_dir=config.output_dir,
        seed=config.seed,
        precision=config.precision,
        data=config.data,
        document_attention=config.document_attention,
        seq_len=seq_len,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size,
        max_steps=steps,
        model=ModelConfig(
            n_layer=gpt.n_layer,
            n_head=gpt.n_head,
            d_model=gpt.d_model,
            d_ff=gpt.d_ff,
            d_embed=gpt.d_embed,
            n_positions=gpt.n_positions,
            activation="gelu_new" if gpt.activation == "gelu_new" else "gelu",
            dropout=gpt.dropout if config.dropout is None else config.dropout,
            layer_norm_epsilon=gpt.layer_norm_epsilon,
            activation_checkpointing=config.activation_checkpointing,
        ),
        ift=_ift(gpt.transform),
        sparsity=sparsity,
        optimizer=config.optimizer,
        schedule=config.resolved_schedule,
        unfreezing=unfreezing,
        deepspeed=config.deepspeed,
        checkpoint=config.checkpointing,
        evaluation=_evaluation(config, steps, unfreezing.every if unfreezing else steps_per_epoch),
        logging=config.logging,
    )


def _evaluation(config: FinetuneConfig, steps: int, period: int) -> EvaluationConfig:
    """Once a `period` (an epoch, or a phase) unless it says otherwise.

    `gradual` keeps the best weights and never stops early: its patience is the whole run.
    """
    evaluation = config.evaluation or EvaluationConfig(patience=3)
    sources = [data for data, _ in open_sources(config.data)]
    if not all("val" in data.splits for data in sources):
        keeps_nothing = config.mode == "gradual" and config.evaluation is None
        return evaluation.model_copy(update={"patience": None}) if keeps_nothing else evaluation
    every = evaluation.every or min(steps, period)
    patience = steps if config.mode == "gradual" else evaluation.patience
    return evaluation.model_copy(update={"every": every, "patience": patience})


def _ift(transform: Transform | None) -> IFTConfig:
    """The forms of the source's layers, as they are; its widths are the model's own."""
    if transform is None:
        return IFTConfig()
    return construct(
        IFTConfig,
        "fine-tuning",
        member=transform.member,
        non_linearity=transform.non_linearity,
        sizes=dict(transform.sizes),
    )


def sequences_per_epoch(config: FinetuneConfig, seq_len: int) -> int:
    """Sequences in one pass over the training data."""
    return sum(
        (data.split("train").n_tokens - 1) // seq_len for data, _ in open_sources(config.data)
    )
