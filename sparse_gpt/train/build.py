"""The parts of a run, built from its configuration."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_gpt.config import DataSource, RunConfig
from sparse_gpt.data.shards import TokenData, open_data
from sparse_gpt.errors import UserError
from sparse_gpt.model.flops import fraction_of_steps
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import Pattern, resolve_kernel
from sparse_gpt.sparse_units import sparse_units
from sparse_gpt.topology.init_masks import random_pattern
from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.structure import BlockStructure


class WeightSource(Protocol):
    """Where initial weights come from: a checkpoint, or a Hugging Face folder."""

    @property
    def gpt_config(self) -> GPTConfig:
        """The model the weights are of."""
        ...

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the tokenizer the weights were trained with; None where that is not known."""
        ...

    @property
    def identity(self) -> str:
        """A digest that tells these weights from others."""
        ...

    def parameter(self, name: str) -> Tensor:
        """A whole parameter, fp32."""
        ...

    def patterns(self) -> dict[str, Pattern]:
        """The topology that comes with the weights; empty for a dense model."""
        ...


def check_source(
    wanted: GPTConfig, given: GPTConfig, data_tokenizer: str | None, tokenizer: str | None
) -> None:
    """Refuse to start from weights of another architecture or tokenizer; names what differs."""
    if data_tokenizer and tokenizer and data_tokenizer != tokenizer:
        raise UserError(
            "data: tokenised by another tokenizer than the one the weights were trained with "
            f"(sha256 {data_tokenizer[:12]} and {tokenizer[:12]}); prepare the data with "
            "--tokenizer <run folder>/tokenizer"
        )
    if given.vocab_size != wanted.vocab_size:
        raise UserError(
            f"data: a vocabulary of {wanted.vocab_size}, but the weights to start from have "
            f"{given.vocab_size}; prepare the data with their tokenizer"
        )
    keys = (
        *("n_layer", "n_head", "d_model", "d_ff", "n_positions"),
        *("activation", "layer_norm_epsilon"),
    )
    differing = [
        f"model.{key}: {getattr(wanted, key)!r} (the weights: {getattr(given, key)!r})"
        for key in keys
        if getattr(wanted, key) != getattr(given, key)
    ]
    if differing:
        raise UserError(f"the weights to start from are of another model: {'; '.join(differing)}")


def check_schedules(config: RunConfig, total_steps: int, warmup_steps: int) -> None:
    """Refuse a warmup and decay that do not fit into the run."""
    schedule, decay = config.schedule, 0
    if schedule.type == "wsd":
        decay = fraction_of_steps(schedule.decay_fraction, total_steps)
    if warmup_steps + decay > total_steps:
        raise UserError(
            f"schedule: {warmup_steps} warmup steps and {decay} decay steps are more than the "
            f"{total_steps} steps of the run; shorten them, or raise max_steps or max_tokens"
        )


def open_sources(sources: tuple[DataSource, ...]) -> list[tuple[TokenData, float]]:
    """Every data source with its weight."""
    return [
        (
            open_data(
                source.path,
                val_fraction=source.val_fraction,
                vocab_size=source.vocab_size,
                tokenizer=source.tokenizer,
            ),
            source.weight,
        )
        for source in sources
    ]


def structure_of(config: RunConfig) -> BlockStructure:
    return BlockStructure(config.sparsity.structure.block, config.sparsity.structure.score)


def initial_patterns(
    config: RunConfig, shapes: dict[str, tuple[int, int]], source: WeightSource | None
) -> dict[str, Pattern]:
    """The first topology: the source's, or random masks for every layer the filter names."""
    units = sparse_units(config)
    given = source.patterns() if source else {}
    if given:
        return {name: given[name] for name in units if name in given}
    structure = structure_of(config)
    return {
        name: random_pattern(name, shapes[name], structure, kept, config.seed)
        for name, (kept, _) in units.items()
    }


def initialiser(
    config: RunConfig, patterns: dict[str, Pattern], source: WeightSource | None
) -> Callable[[GPT, Callable[[Any], AbstractContextManager[object]] | None], None]:
    """A function that fills a model's parameters and makes the pattern's outside exactly zero."""

    def initialise(
        model: GPT, gathered: Callable[[Any], AbstractContextManager[object]] | None
    ) -> None:
        if source is None:
            model.init_weights(config.seed, gathered)
        for name, parameter in model.named_parameters():
            if source is None and name not in patterns:
                continue
            with gathered(parameter) if gathered else nullcontext(), torch.no_grad():
                if source is not None:
                    parameter.copy_(source.parameter(name))
                if name in patterns:
                    patterns[name].to(parameter.device).apply_(parameter.data)

    return initialise


def install_patterns(
    model: GPT, patterns: dict[str, Pattern], config: RunConfig, device: torch.device
) -> dict[str, SparseLinear]:
    """Give each sparse layer its pattern and kernel; returns the sparse layers by weight name."""
    kernel = resolve_kernel(config.sparsity.kernel, device, config.sparsity.storage)
    layers = model.sparse_layers()
    for name, pattern in patterns.items():
        layers[name].pattern = pattern.to(device)
        layers[name].kernel = kernel
    return {name: layers[name] for name in patterns}


def schedule_of(config: RunConfig, world_size: int) -> UpdateSchedule:
    drop = config.sparsity.drop_fraction
    return UpdateSchedule(
        freq=config.sparsity.update.freq,
        stop=config.update_stop(world_size),
        init=drop.init,
        half_period=drop.half_period,
        kind=drop.type,
    )


def method_of(config: RunConfig) -> Any:
    return METHODS[config.sparsity.algorithm]
