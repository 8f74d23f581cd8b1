"""SPDF: fine-tune a sparsely pretrained model, densely or with its masks (Sparse-IFT, App. E)."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_gpt.config import TimeoutsConfig
from sparse_gpt.config_file import dump_yaml, read_tree, validate
from sparse_gpt.durable import write_json, write_text
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.finetune.grid import tune_grid
from sparse_gpt.finetune.source import check_masks, open_source
from sparse_gpt.finetune.tune import tune
from sparse_gpt.topology.masks import unfinished
from sparse_gpt.train.build import WeightSource
from sparse_gpt.train.engine import init_ranks, log_on_first_rank
from sparse_gpt.train.every_rank import on_every_rank, read_first
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.signals import Command, started
from sparse_gpt.train.watch import Watch

log = logging.getLogger(__name__)


def finetune(config_path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune as a config file says; returns (and writes) `results.json`.

    Raises `UserError` for bad input, and for `mode: sparse` from weights without masks.
    """

    since = started()

    def read_config() -> FinetuneConfig:
        return validate(FinetuneConfig, read_tree(config_path, list(overrides)), str(config_path))

    read = read_first(read_config)
    init_ranks()
    log_on_first_rank()
    config = read.on_every_rank(str(config_path))
    with Watch(TimeoutsConfig()) as watch:
        results = _finetune(config, Command(config.run_dir, since), watch)
    dist.destroy_process_group()
    return results


def _finetune(config: FinetuneConfig, command: Command, watch: Watch) -> dict[str, Any]:
    opened: list[WeightSource] = []
    on_every_rank(lambda: opened.append(open_source(config.checkpoint)), "checkpoint")
    source, run_dir = opened[0], config.run_dir
    if config.keeps_masks:
        check_masks(config.mode, str(config.checkpoint), list(source.layers.values()))
    elif problem := unfinished(source.layers.values()):
        log.warning("checkpoint %s was %s", config.checkpoint, problem)
    if dist.get_rank() == 0:
        print(dump_yaml(config).rstrip(), flush=True)
    if config.lr_grid is None:
        results = tune(config, source, ("val", "test"), command, watch)
    else:
        results = tune_grid(config, source, command, watch)

    def write() -> None:
        write_text(run_dir / "finetune.yaml", dump_yaml(config))
        write_json(run_dir / "results.json", results)
        print(f"results in {run_dir / 'results.json'}", flush=True)

    on_first_rank(write, "output_dir")
    return results
