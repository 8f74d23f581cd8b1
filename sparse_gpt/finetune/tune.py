"""One fine-tuning, at one learning rate."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from sparse_gpt.config import RunConfig
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.finetune.run_config import run_config, sequences_per_epoch
from sparse_gpt.train.build import WeightSource
from sparse_gpt.train.every_rank import check_nodes
from sparse_gpt.train.loop import Trainer
from sparse_gpt.train.results import describe
from sparse_gpt.train.signals import Command
from sparse_gpt.train.watch import Watch


def tune(
    config: FinetuneConfig,
    source: WeightSource,
    splits: Sequence[str],
    command: Command,
    watch: Watch,
) -> dict[str, Any]:
    """Fine-tune, or go on, to the end; returns what happened, with the loss over `splits`.

    The weights evaluated are those of the best validation where `evaluation.patience` kept them,
    else the last. `watch`: entered, and around all that the command does. A collective.
    """
    gc.collect()  # the engine of the learning rate before
    run = run_config(config, source, dist.get_world_size())
    watch.step = 0
    check_nodes(run)
    trainer = Trainer(run, source, command, watch)
    try:
        return _tune(config, source, trainer, splits)
    finally:
        trainer.close()


def _tune(
    config: FinetuneConfig, source: WeightSource, trainer: Trainer, splits: Sequence[str]
) -> dict[str, Any]:
    state = replace(trainer.fit())  # loading the best checkpoint brings back its own state
    best = trainer.checkpointer.newest("best")
    if best is not None:
        trainer.load(best)
    layers = source.layers.values()
    weights = sum(layer.weights for layer in layers)
    active = sum(layer.active_weights for layer in layers)
    unfreezing = trainer.config.unfreezing
    never = [layer.never_active_weights for layer in layers]
    results: dict[str, Any] = {
        "mode": config.mode,
        "checkpoint": str(config.checkpoint),
        "lr": config.optimizer.lr,
        "seed": config.seed,
        "steps": state.step,
        "epochs": state.samples / sequences_per_epoch(config, trainer.config.seq_len),
        "tokens": state.tokens,
        "flops_spent": state.flops_spent,
        "precision": trainer.precision,
        "device": trainer.device.type,
        "ranks": trainer.world_size,
        "tested_step": trainer.state.step,
        "stopped_early": state.finished,
        "validation_loss": trainer.state.best_loss,
        "optimizer": "fresh AdamW, zero moments",
        "schedule": describe_schedule(trainer.config),
        "unfreezing": None if unfreezing is None else unfreezing.model_dump(),
        "sparse_layer_weights": weights,
        "weights_outside_masks": weights - active,
        # Outside every mask that pretraining had; None where the checkpoint does not say.
        "weights_never_active": None if None in never else sum(map(int, filter(None, never))),
        "weights_outside_masks_train": config.mode == "dense",
    }
    for split in splits:
        if all(split in data.splits for data, _ in trainer.data):
            results[split] = describe(trainer, split)
            say_result(trainer, config.mode, split, results[split])
    return results


def describe_schedule(run: RunConfig) -> str:
    """In words: `fresh cosine`, `fresh linear, rewound every 20 steps`."""
    rewound = f", rewound every {run.unfreezing.every} steps" if run.unfreezing else ""
    return f"fresh {run.schedule.type}{rewound}"


def say_result(trainer: Trainer, mode: str, split: str, result: dict[str, Any]) -> None:
    """One line on what a split came to."""
    words = result["word_perplexity"]
    trainer.metrics.say(
        f"{split:<10} {mode} fine-tuning: loss {result['loss']:.4f}  perplexity "
        f"{result['token_perplexity']:.2f} a token"
        + (f", {words:,.1f} a word" if words is not None else "")
    )
