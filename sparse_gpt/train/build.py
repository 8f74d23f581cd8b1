"""The parts of a run, built from its configuration."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.config import DataSource, RunConfig
from sparse_gpt.data.shards import TokenData, open_data
from sparse_gpt.errors import UserError
from sparse_gpt.model.flops import fraction_of_steps, linear_shapes
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import (
    BlockLayout,
    inverse_power,
    refusals,
    resolve_compact,
    resolve_kernel,
)
from sparse_gpt.run_method import method_of
from sparse_gpt.sparse_units import Solution
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.compact import CompactController, DrawnMasks
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.interfaces import SavedMasks, Together
from sparse_gpt.topology.masks import LayerMask, SavedLayer
from sparse_gpt.topology.scorer import UnitMaker
from sparse_gpt.topology.shards import Shards
from sparse_gpt.topology.structure import BlockStructure
from sparse_gpt.train.optim import AdamW, optimizer_steps
from sparse_gpt.train.young_weights import YoungWeights


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

    @property
    def layers(self) -> dict[str, SavedLayer]:
        """The sparse layers that come with the weights; empty for a dense model."""
        ...

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """bool `[count]`: units `start .. start + count - 1` of a sparse layer's A, or its B."""
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
        *("n_layer", "n_head", "d_model", "d_ff", "d_embed", "n_positions"),
        *("activation", "layer_norm_epsilon"),
    )
    differing = [
        f"model.{key}: {getattr(wanted, key)!r} (the weights: {getattr(given, key)!r})"
        for key in keys
        if getattr(wanted, key) != getattr(given, key)
    ]
    if wanted.transform != given.transform:
        members = [c.transform.member if c.transform else "plain" for c in (wanted, given)]
        differing.append(
            f"ift: layers of the form {members[0]} (the weights: {members[1]}), or of other sizes"
        )
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


def initial_units(solution: Solution, source: WeightSource | None) -> dict[str, int]:
    """Active units of every sparse layer: the source's, or those the run was solved for.

    A layer that keeps all its units is dense: it has no mask, and takes no part in updates.
    """
    units = solution.units
    if source is not None and source.layers:
        return {name: source.layers[name].active for name in units if name in source.layers}
    return {name: kept for name, (kept, every) in units.items() if kept < every}


def initialiser(
    config: RunConfig, source: WeightSource | None, sparse: Iterable[str], together: Together
) -> Callable[[GPT, Callable[[Any], AbstractContextManager[object]] | None], None]:
    """A function that fills a model's parameters; masks come later, where they are sharded.

    `sparse`: weights of sparse layers, which Powerpropagation's parameters are powers of. The
    source is read by every rank, `together`.
    """
    alpha = config.sparsity.powerpropagation

    def initialise(
        model: GPT, gathered: Callable[[Any], AbstractContextManager[object]] | None
    ) -> None:
        layers = model.sparse_layers()
        if source is None:
            model.init_weights(config.seed, gathered)
        else:
            parameter_of = source.parameter
            for name, parameter in model.named_parameters():
                layer = layers.get(name)
                layout = None if layer is None else layer.layout
                read: list[Tensor] = []
                together(lambda name=name, read=read: read.append(parameter_of(name)))
                with gathered(parameter) if gathered else nullcontext(), torch.no_grad():
                    weight = read[0]
                    parameter.copy_(weight if layout is None else layout.gather(weight))
        if alpha != 1.0:
            for name in sparse:
                parameter = model.get_parameter(name)
                with gathered(parameter) if gathered else nullcontext(), torch.no_grad():
                    parameter.copy_(inverse_power(parameter, alpha))

    return initialise


def sparse_layers(
    model: GPT, names: Iterable[str], config: RunConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, SparseLinear]:
    """The layers that are sparse, by weight name, with their kernel."""
    sparsity = config.sparsity
    layers = {name: layer for name, layer in model.sparse_layers().items() if name in set(names)}
    if sparsity.storage == "compact" and layers:
        place = (device, sparsity.structure.block, dtype)
        refused = _refused_by_any(refusals(*place))
        _, compact = resolve_compact(sparsity.kernel, *place, refused)
        for layer in layers.values():
            layer.compact_kernel = compact
    elif layers:
        kernel = resolve_kernel(sparsity.kernel, device, dtype)
        for layer in layers.values():
            layer.kernel = kernel
    for layer in layers.values():
        layer.alpha = sparsity.powerpropagation
    return layers


def _refused_by_any(mine: dict[str, str | None]) -> dict[str, str | None]:
    """Why kernels cannot run on some rank, by the first that says so. A collective.

    Ranks must take the same one: kernels make their gradients in different orders, and ranks
    exchange gradients in the order in which they are made.
    """
    found: list[dict[str, str | None]] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    refused = dict(mine)
    for rank, theirs in reversed(list(enumerate(found))):
        for name, reason in theirs.items():
            if reason is not None:
                refused[name] = reason if mine[name] == reason else f"rank {rank}: {reason}"
    return refused


def first_topology(
    config: RunConfig,
    solution: Solution,
    units: dict[str, int],
    source: WeightSource | None,
    world_size: int,
) -> SavedMasks | None:
    """The topology that compactly stored weights have their size by; None with masked storage.

    The source's, or drawn as it is for masked storage.
    """
    if config.sparsity.storage == "masked" or not units:
        return None
    if source is not None and source.layers:
        return source
    shapes = linear_shapes(solution.dims, config.transform)
    maker = UnitMaker(shapes, units, structure_of(config), config.seed)
    return DrawnMasks(maker.draw(method_of(config, world_size), units))


def layouts_of(
    config: RunConfig, solution: Solution, units: Iterable[str], topology: SavedMasks | None
) -> dict[str, BlockLayout]:
    """Where the blocks of a first topology lie, in canonical order, on the CPU."""
    if topology is None:
        return {}
    structure, layouts = structure_of(config), {}
    shapes = linear_shapes(solution.dims, config.transform)
    for name in units:
        rows, columns = structure.grid(shapes[name])
        active = topology.mask(name, 0, rows * columns).nonzero().view(-1)
        layouts[name] = BlockLayout(shapes[name], structure.block, active)
    return layouts


def controller_of(
    config: RunConfig,
    layers: dict[str, SparseLinear],
    units: dict[str, int],
    shards: Shards,
    saved: SavedMasks | None,
    world_size: int,
    together: Together,
) -> TopologyController:
    """The topology of a run, at its start: the method's own, or `saved`. A collective."""
    sparsity = config.sparsity
    method, structure = method_of(config, world_size), structure_of(config)
    common = (layers, units, structure, method, config.seed, shards, saved)
    holds = sparsity.update.mode == "replace"
    if sparsity.storage == "compact":
        return CompactController(
            *common,
            hold_step=holds,
            together=together,
            growth_score=sparsity.growth_score,
            micro_steps=config.accumulation(world_size),
        )
    return TopologyController(
        *common,
        whole_model=sparsity.update.scope == "model",
        global_start=sparsity.distribution == "global",
        hold_step=holds,
        together=together,
        # The masked kernel is a dense product: weights outside the mask are zero already.
        show_patterns=sparsity.kernel not in ("auto", "masked"),
    )


def watch_young_weights(
    config: RunConfig, optimizer: AdamW, shards: Shards, controller: TopologyController
) -> None:
    """Step grown weights by SMET's rule: the controller says which grow, the optimizer obeys."""
    settings = config.optimizer
    young = optimizer.young = YoungWeights(shards, settings.smet_warmup, settings.betas)

    def grown(name: str, units: Bits, mask: LayerMask) -> None:
        young.move(name, units, mask, optimizer_steps(optimizer))

    controller.on_grown = grown


def structure_of(config: RunConfig) -> BlockStructure:
    structure = config.sparsity.structure
    return BlockStructure(
        block=structure.block,
        score=structure.score,
        n_m=structure.n_m,
        transposable=structure.transposable,
        balanced=structure.balanced == "row",
    )
