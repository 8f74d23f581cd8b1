"""Small runs in real ranks: their configuration, and a Trainer that is freed again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from tests.ranks import cleanup_engine

WIDTH, VOCABULARY = 64, 257


def run_config(corpus: Path | str, output_dir: Path | str, **changes: Any) -> RunConfig:
    """Two layers of width 64, Sparse Wide off; `changes` are dotted keys with `__` for dots."""
    tree: dict[str, Any] = {
        "output_dir": str(output_dir),
        "data": [{"path": str(corpus)}],
        "seq_len": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": 12,
        "precision": "fp32",
        # 0.02 would leave gradients of q and k near zero at this width.
        "model": {"n_layer": 2, "n_head": 2, "d_model": WIDTH, "init_std": 0.08},
        "sparsity": {"sparsity": 0.75, "algorithm": "set", "update": {"freq": 3}},
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 3},
        "deepspeed": {"zero_stage": 2, "param_persistence_threshold": 500},
        "evaluation": {"sequences": 8},
        "logging": {"every": 1},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return validate(RunConfig, tree, "test")


@contextmanager
def trainer(config: RunConfig, source: Any = None) -> Iterator[Any]:
    """A Trainer in a rank of the pool, its engine freed at the end."""
    from sparse_gpt.train.loop import Trainer

    made = Trainer(config, source)
    try:
        yield made
    finally:
        made.metrics.close()
        made.folder.release()
        engine = made.engine
        for reference in ("engine", "optimizer", "shards", "controller", "checkpointer"):
            delattr(made, reference)
        cleanup_engine(engine)


def after_every_step(made: Any, look: Callable[[int, Any, Any], None]) -> None:
    """Make `fit` call `look(step, health, update)` after each optimizer step."""
    inner = made._step

    def step_and_look(step: int, batches: Any) -> Any:
        health, update = inner(step, batches)
        look(step, health, update)
        return health, update

    made._step = step_and_look


def model_weights(made: Any, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, flat tensor) of each copy of the weight that the model computes with, on this rank.

    At stage 3 that is the rank's part, and the whole of it where it is kept gathered.
    """
    p: Any = made.shards.parameters[name]
    if hasattr(p, "ds_tensor"):
        size = p.ds_tensor.ds_numel
        start = torch.distributed.get_rank() * size
        yield start, p.ds_tensor.data.view(-1)[: max(0, min(size, p.ds_numel - start))]
        if p.data.numel() == p.ds_numel:
            yield 0, p.data.reshape(-1)
    else:
        yield 0, p.data.reshape(-1)


def masks(made: Any) -> dict[str, torch.Tensor]:
    """Every sparse layer's mask, over its block grid."""
    return {name: pattern.active.clone() for name, pattern in made.controller.patterns()}


def assemble(made: Any, name: str, local: torch.Tensor | None) -> torch.Tensor:
    """The whole parameter from every rank's part `local` (1-D, fp32), on every rank."""
    shape, fragment = made.shards.shape(name), made.shards.fragment(name)
    full = torch.zeros(torch.Size(shape).numel())
    if fragment is not None and local is not None:
        full[fragment.start : fragment.start + fragment.numel] = local.float()
    return made.shards.sum_over_ranks(full).view(shape)
