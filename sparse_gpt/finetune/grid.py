"""A grid of learning rates: one fine-tuning each, chosen on the validation loss."""

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.finetune.tune import tune
from sparse_gpt.json_file import read_json
from sparse_gpt.train.build import WeightSource, open_sources
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.guard import Diverged
from sparse_gpt.train.signals import Command
from sparse_gpt.train.watch import Watch

log = logging.getLogger(__name__)

# What does not change the result: where things go, what is logged or kept.
_FREE = (
    *("name", "output_dir", "logging", "checkpointing", "keep_checkpoints"),
    *("micro_batch_size", "deepspeed", "activation_checkpointing", "storage", "kernel"),
)


def tune_grid(
    config: FinetuneConfig, source: WeightSource, command: Command, watch: Watch
) -> dict[str, Any]:
    """Fine-tune with every learning rate of `lr_grid`; test the one of the lowest loss.

    Every learning rate has a folder `lr-<lr>` in that of the command and, once it is done, a
    `results.json` there: it is not trained again while configuration, weights and data stay what
    they were. One that diverged is out of the choice. Returns the results of the chosen one, with
    `lr_grid` (validation loss by learning rate, None where it diverged), `lr_at_edge`, and the
    folder `run`. Raises `UserError` without a validation split, and where all diverged. A
    collective.
    """
    assert config.lr_grid is not None
    run_dir = command.run_dir
    if not all("val" in data.splits for data, _ in open_sources(config.data)):
        raise UserError(
            "lr_grid chooses on the validation loss, but a data source has no val split; prepare "
            "it with --val-fraction, or give optimizer.lr in place of lr_grid"
        )
    losses: dict[float, float | None] = {}
    for lr in config.lr_grid:
        one = single(config, run_dir, lr)
        losses[lr] = _validation_loss(one, source, command, watch)
        if config.keep_checkpoints == "best":
            for loser in losses.keys() - {_best(losses)}:
                _drop_checkpoints(run_dir / lr_folder(loser))
    lr = _best(losses)
    if lr is None:
        raise UserError(
            f"lr_grid: fine-tuning diverged at all of {', '.join(map(str, losses))}; add lower ones"
        )
    at_edge = len(losses) > 1 and lr in (min(losses), max(losses))
    log.info("chosen     lr %g, validation loss %.4f", lr, losses[lr])
    if at_edge:
        side, more = ("lowest", "lower") if lr == min(losses) else ("highest", "higher")
        log.warning(
            "lr_grid: the best learning rate, %g, is the %s of the grid; a %s one may be better",
            *(lr, side, more),
        )
    results = tune(single(config, run_dir, lr), source, ("val", "test"), command, watch)
    return results | {
        "lr_grid": {str(key): loss for key, loss in losses.items()},
        "lr_at_edge": at_edge,
        "run": lr_folder(lr),
    }


def lr_folder(lr: float) -> str:
    return f"lr-{lr:g}"


def single(config: FinetuneConfig, run_dir: Path, lr: float) -> FinetuneConfig:
    """The fine-tuning at one learning rate of the grid."""
    return config.model_copy(
        update={
            "name": f"{config.name}_lr-{lr:g}",
            "output_dir": run_dir / lr_folder(lr),
            "lr_grid": None,
            "optimizer": config.optimizer.model_copy(update={"lr": lr}),
        }
    )


def identity(config: FinetuneConfig, source: WeightSource) -> str:
    """A digest of what a fine-tuning's result depends on, rounding apart."""
    tree = {k: v for k, v in json.loads(config.model_dump_json()).items() if k not in _FREE}
    tree["checkpoint"] = source.identity
    tree["batch"] = config.global_batch_size or config.micro_batch_size * dist.get_world_size()
    tree["data"] = [[data.identity, weight] for data, weight in open_sources(config.data)]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _validation_loss(
    config: FinetuneConfig, source: WeightSource, command: Command, watch: Watch
) -> float | None:
    """Of one learning rate, trained if it was not; None where it diverged. A collective."""
    folder, made = config.run_dir, identity(config, source)
    file, lr = folder / "results.json", config.optimizer.lr
    done = on_first_rank(lambda: _read_done(file, made), str(file))
    if done is not None:
        log.info("lr %g     done before, in %s", lr, file)
    else:
        try:
            done = tune(config, source, ("val",), command, watch)
        except Diverged as problem:
            log.warning("lr %g     diverged: %s", lr, problem)
            done = {"lr": lr, "diverged": str(problem)}
        done["identity"] = made
        on_first_rank(lambda: write_json(file, done), str(file))
    loss = done["val"]["loss"] if "diverged" not in done else math.nan
    return loss if math.isfinite(loss) else None


def _read_done(file: Path, made: str) -> dict[str, Any] | None:
    """What is there, if it is of this fine-tuning."""
    if not file.is_file():
        return None
    try:
        done = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"not JSON ({error}); move it away") from None
    return done if isinstance(done, dict) and done.get("identity") == made else None


def _best(losses: dict[float, float | None]) -> float | None:
    """The learning rate of the lowest loss, the first of equal ones; None where all diverged."""
    known = {lr: loss for lr, loss in losses.items() if loss is not None}
    return min(known, key=lambda lr: known[lr]) if known else None


def _drop_checkpoints(folder: Path) -> None:
    def drop() -> None:
        if (folder / "checkpoints").exists():
            shutil.rmtree(folder / "checkpoints")

    on_first_rank(drop, str(folder))
