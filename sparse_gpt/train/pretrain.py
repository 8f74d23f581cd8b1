"""`launch/pretrain.py` as a function."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import dump_yaml, load_config
from sparse_gpt.errors import Stopped
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.plan import plan, render
from sparse_gpt.train.engine import init_ranks, log_on_first_rank
from sparse_gpt.train.every_rank import check_nodes, read_first
from sparse_gpt.train.loop import Trainer, TrainState
from sparse_gpt.train.results import final_results
from sparse_gpt.train.watch import Watch


def pretrain(config_path: Path | str, overrides: Sequence[str] = ()) -> TrainState:
    """Train the model of a config file to its end; returns the final state.

    Prints the resolved configuration and the plan first. Raises `UserError` for bad input, and
    `Stopped` where the run was asked to stop.
    """
    read = read_first(lambda: load_config(config_path, list(overrides)))
    init_ranks(read.value.timeouts.exchange if read.value is not None else None)
    log_on_first_rank()
    config = read.on_every_rank(str(config_path))
    try:
        with Watch(config.timeouts) as watch:
            state = _train(config, watch)
    except Stopped:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    return state


def _train(config: RunConfig, watch: Watch) -> TrainState:
    source = None
    if config.init_from is not None:
        weights = config.init_from
        source = read_first(lambda: ImportedWeights(weights)).on_every_rank("init_from")
    check_nodes(config)
    trainer = Trainer(config, source, watch=watch)
    trainer.metrics.say(dump_yaml(config).rstrip())
    trainer.metrics.say(
        render(plan(config, trainer.vocab_size, trainer.world_size, trainer.precision))
    )
    trainer.metrics.say(
        f"{trainer.world_size} ranks on {trainer.device.type}, {trainer.precision}, "
        f"ZeRO stage {config.deepspeed.zero_stage}, in {trainer.run_dir}"
    )
    try:
        state = trainer.fit()
        if config.evaluation.final:
            final_results(trainer)
    except Stopped:
        trainer.close()
        raise
    trainer.close()
    return state
