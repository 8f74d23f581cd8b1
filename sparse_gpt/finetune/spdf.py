"""SPDF: fine-tune a sparsely pretrained model, densely or with its masks (Sparse-IFT, App. E)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_gpt.config import (
    IFTConfig,
    ModelConfig,
    RunConfig,
    SparsityConfig,
    StructureConfig,
    UpdateConfig,
)
from sparse_gpt.config_file import construct, dump_yaml, read_tree, validate
from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.ift import Transform
from sparse_gpt.topology.masks import SavedLayer
from sparse_gpt.train.build import WeightSource, open_sources
from sparse_gpt.train.checkpoint_files import open_checkpoint
from sparse_gpt.train.engine import init_ranks, log_on_first_rank
from sparse_gpt.train.every_rank import check_nodes
from sparse_gpt.train.loop import Evaluation, Trainer


def check_masks(checkpoint: str, layers: Sequence[SavedLayer]) -> None:
    """Refuse weights without masks to keep, or with those of a sparsity yet to be reached."""
    if not layers:
        raise UserError(f"mode: sparse, but {checkpoint} has no masks to keep; set mode: dense")
    active = sum(layer.active for layer in layers)
    target = sum(layer.active if layer.target is None else layer.target for layer in layers)
    if active != target:
        raise UserError(
            f"mode: sparse, but {checkpoint} was saved before its method reached its sparsity "
            f"({active:,} active blocks, {target:,} at the end); train it to the end, or set "
            "mode: dense"
        )


def finetune(config_path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune as a config file says; returns (and writes) `results.json`.

    Raises `UserError` for bad input, and for `mode: sparse` from weights without masks.
    """
    tree = read_tree(config_path, list(overrides))
    config = validate(FinetuneConfig, tree, str(config_path))
    init_ranks()
    log_on_first_rank()
    source = open_source(config.checkpoint)
    if config.mode == "sparse":
        check_masks(str(config.checkpoint), list(source.layers.values()))
    run = run_config(config, source, dist.get_world_size())
    check_nodes(run)
    trainer = Trainer(run, source)
    trainer.metrics.say(dump_yaml(config).rstrip())
    state = replace(trainer.fit())  # loading the best checkpoint brings back its own state
    best = trainer.checkpointer.newest("best")
    if best is not None:
        trainer.load(best)
    weights = sum(layer.weights for layer in source.layers.values())
    active = sum(layer.active_weights for layer in source.layers.values())
    results: dict[str, Any] = {
        "mode": config.mode,
        "checkpoint": str(config.checkpoint),
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "steps": state.step,
        "tested_step": trainer.state.step,
        "stopped_early": state.finished,
        "validation_loss": trainer.state.best_loss,
        "optimizer": "fresh AdamW, zero moments",
        "schedule": f"fresh {config.schedule.type}",
        "sparse_layer_weights": weights,
        "weights_outside_masks": weights - active,
        "weights_outside_masks_train": config.mode == "dense",
    }
    for split in ("val", "test"):
        if all(split in data.splits for data, _ in trainer.data):
            results[split] = describe(trainer, split)
    if trainer.rank == 0:
        write_json(trainer.run_dir / "results.json", results)
    for split in ("val", "test"):
        if split in results:
            r = results[split]
            words = r["word_perplexity"]
            trainer.metrics.say(
                f"{split:<10} {config.mode} fine-tuning: loss {r['loss']:.4f}  perplexity "
                f"{r['token_perplexity']:.2f} a token"
                + (f", {words:,.1f} a word" if words is not None else "")
            )
    trainer.metrics.say(f"results in {trainer.run_dir / 'results.json'}")
    trainer.close()
    dist.destroy_process_group()
    return results


def open_source(path: Path) -> WeightSource:
    """A checkpoint of ours, or a Hugging Face GPT-2 folder."""
    if (path / "config.json").is_file():
        return ImportedWeights(path)
    return open_checkpoint(path)


def run_config(config: FinetuneConfig, source: WeightSource, world_size: int) -> RunConfig:
    """The training run behind a fine-tuning: the source's model, static masks or none."""
    gpt = source.gpt_config
    seq_len = config.seq_len or gpt.n_positions
    if seq_len > gpt.n_positions:
        raise UserError(
            f"seq_len {seq_len} is longer than the {gpt.n_positions} positions of the checkpoint"
        )
    batch = config.global_batch_size or config.micro_batch_size * world_size
    steps_per_epoch = max(1, math.ceil(_sequences(config, seq_len) / batch))
    steps = config.max_steps or math.ceil((config.epochs or 1.0) * steps_per_epoch)
    layers = source.layers if config.mode == "sparse" else {}
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
    evaluation = config.evaluation
    sources = [data for data, _ in open_sources(config.data)]
    if evaluation.every is None and all("val" in data.splits for data in sources):
        evaluation = evaluation.model_copy(update={"every": min(steps, steps_per_epoch)})
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
        schedule=config.schedule,
        deepspeed=config.deepspeed,
        checkpoint=config.checkpointing,
        evaluation=evaluation,
        logging=config.logging,
    )


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


def _sequences(config: FinetuneConfig, seq_len: int) -> int:
    """Sequences in one pass over the training data."""
    return sum(
        (data.split("train").n_tokens - 1) // seq_len for data, _ in open_sources(config.data)
    )


def describe(trainer: Trainer, split: str) -> dict[str, Any]:
    """Loss and perplexity a token and a (white-space) word of the source text, over a split."""
    result: Evaluation = trainer.evaluate(split)
    splits = [data.split(split) for data, _ in trainer.data]
    tokens, words = sum(s.n_tokens for s in splits), [s.n_words for s in splits]
    word_perplexity = None
    if all(words):
        ratio = tokens / sum(count or 0 for count in words)
        word_perplexity = math.exp(min(result.loss * ratio, 700.0))
    return {
        "loss": result.loss,
        "token_perplexity": result.perplexity,
        "word_perplexity": word_perplexity,
        "scored_tokens": result.tokens,
    }
