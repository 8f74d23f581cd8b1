"""Model, engine and topology of a run, put together from what its configuration says."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_gpt.config import RunConfig
from sparse_gpt.data.loader import PackedDataset
from sparse_gpt.data.order import derive_key
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.ops import BlockLayout
from sparse_gpt.sparse_units import Solution, scoring_cost
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.interfaces import SavedMasks
from sparse_gpt.topology.shards import Shards, shards_of
from sparse_gpt.train import build
from sparse_gpt.train.engine import build_model, deepspeed_config, start_engine
from sparse_gpt.train.every_rank import on_every_rank
from sparse_gpt.train.init_masks import MaskFinder, saved_counts


@dataclass(frozen=True)
class Assembly:
    """What trains: a DeepSpeed engine with its optimizer, the shards behind it, the topology.

    `flops_spent`: on finding the first masks.
    """

    engine: Any
    optimizer: Any
    shards: Shards
    controller: TopologyController
    flops_spent: int


def assemble(
    config: RunConfig,
    source: build.WeightSource | None,
    *,
    gpt_config: GPTConfig,
    solution: Solution,
    data: PackedDataset,
    tokenizer_sha256: str | None,
    device: torch.device,
    precision: str,
) -> Assembly:
    """Masks are drawn and applied where the masters are sharded. A collective.

    `source`: where initial weights come from, if they are not random; `data`: what masks are
    scored on; `precision`: as resolved for `device`.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if source is not None:
        build.check_source(gpt_config, source.gpt_config, tokenizer_sha256, source.tokenizer_sha256)
    units = build.initial_units(solution, source)
    finder, flops_spent = None, 0
    if config.sparsity.init_mask != "random":
        counts = saved_counts(config.run_dir / "checkpoints", units)
        if counts is None:
            finder = MaskFinder(config, units, data, rank, world_size, device)
            cost = scoring_cost(config, gpt_config.vocab_size, solution)
            flops_spent = config.batch(world_size) * cost
        units = counts or units
    ds_config = deepspeed_config(config, precision, world_size, device)
    drawn = build.first_topology(config, solution, units, source, world_size)
    layouts: dict[str, BlockLayout] = {}
    together = functools.partial(on_every_rank, where="the weights to start from")
    together(lambda: layouts.update(build.layouts_of(config, solution, units, drawn)))
    initialise = build.initialiser(config, source, units, together)
    model = build_model(config, gpt_config, ds_config, initialise, layouts)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = build.sparse_layers(model, units, config, device, dtype)
    torch.manual_seed(derive_key(config.seed, "rank", rank) % 2**63)
    if finder is not None:
        finder.before_engine(model)
    engine, optimizer = start_engine(model, config, ds_config, units)
    shards = shards_of(engine, optimizer)
    for layer in layers.values():
        layer.layout = None if layer.layout is None else layer.layout.to(device)
    saved: SavedMasks | None = source if source is not None and source.layers else drawn
    if finder is not None:
        saved = finder.find(engine, optimizer, shards)
        units = saved.units
    controller = build.controller_of(config, layers, units, shards, saved, world_size, together)
    shards.push_masters()
    if config.optimizer.growth == "smet":
        build.watch_young_weights(config, optimizer, shards, controller)
    return Assembly(engine, optimizer, shards, controller, flops_spent)
