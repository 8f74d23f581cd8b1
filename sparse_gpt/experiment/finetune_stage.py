"""SPDF as a stage of an experiment: fine-tunings that follow a pretraining run, one a mode."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_gpt.config_file import validate
from sparse_gpt.data.shards import TokenData
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.follow_up import FollowUp
from sparse_gpt.experiment.plan import Planner, Run
from sparse_gpt.experiment.spec import FinetuneStage
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.train.unfreezing import phases

OWN_KEYS = ("name", "output_dir", "seed", "checkpoint", "mode")


@dataclass(frozen=True)
class Work:
    """What a fine-tuning takes at most: every learning rate, all epochs. 0 until its data is made.

    `masked_flops_total`: with products over zeros too, as masked kernels make them.
    """

    steps: int
    tokens: int
    flops_total: int
    masked_flops_total: int


@dataclass(frozen=True)
class FinetuneRun(FollowUp):
    """One fine-tuning of the weights of the run `after`, over its learning rates."""

    config: FinetuneConfig
    plan: Work
    corpora: tuple[str, ...]
    stage: str = "finetune"
    match: None = None

    @property
    def name(self) -> str:
        """`<arm>-s<seed>-finetune-<mode>`; of files and folders."""
        return f"{self.after.name}-finetune-{self.config.mode}"

    @property
    def row(self) -> str:
        """What runs that differ in the seed alone have in common."""
        return f"{self.arm}, then {self.config.mode}"

    @property
    def folder(self) -> Path:
        """Results, log, and a folder for each learning rate."""
        return self.config.run_dir

    def metric_folders(self) -> list[Path]:
        """Where logs of metrics lie: what they count is what `plan.steps` counts."""
        if self.config.lr_grid is None:
            return [self.folder]
        return [path for path in self.folder.glob("lr-*") if path.is_dir()]

    def arguments(self, config: Path) -> list[str]:
        """Of the script that runs it."""
        return [str(config), "checkpointing.resume=auto"]


def finetunings(planner: Planner, stage: FinetuneStage, where: str, run: Run) -> Iterator[Any]:
    """The fine-tunings of a pretraining run: one a mode; masks are kept where there are some.

    Raises `UserError` naming the key, `where` it is, that does not fit.
    """
    chosen = run.group == "main" if stage.arms is None else run.arm in stage.arms
    if not chosen:
        return
    for mode in stage.modes:
        if mode != "dense" and not run.plan.sparse_layers:
            continue
        tree = copy.deepcopy(stage.config)
        for key in OWN_KEYS:
            if key in tree:
                raise UserError(f"{where}.config.{key}: the experiment sets it; leave it out")
        corpora = []
        for entry in tree.get("data") or ():
            if isinstance(entry, dict) and entry.get("path") in planner.experiment.data:
                corpora.append(entry["path"])
                entry["path"] = str(planner.corpora.path(entry["path"]))
        if not corpora:
            names = ", ".join(planner.experiment.data)
            raise UserError(f"{where}.config.data: names no corpus of this experiment ({names})")
        folder = run.folder.with_name(f"{run.name}-finetune-{mode}")
        tree |= {"name": folder.name, "output_dir": str(folder), "mode": mode}
        tree |= {"checkpoint": str(run.folder), "seed": run.seed}
        if mode == "dense":  # what is said of sparse layers is of the other modes
            tree = {k: v for k, v in tree.items() if k not in ("storage", "kernel")}
        config = validate(FinetuneConfig, tree, f"{where}.config")
        if config.global_batch_size is None:  # of these ranks; a run is known by it
            tree["global_batch_size"] = config.micro_batch_size * planner.experiment.ranks
            config = validate(FinetuneConfig, tree, f"{where}.config")
        data = [planner.corpora.opened(name) for name in corpora]
        work = _work(config, run, data)
        yield FinetuneRun(run, config, work, tuple(corpora))


def _work(config: FinetuneConfig, run: Run, data: list[TokenData | None]) -> Work:
    known = [tokens for tokens in data if tokens is not None]
    if len(known) < len(data):
        return Work(0, 0, 0, 0)
    plan = run.plan
    seq_len = config.seq_len or plan.model.n_positions
    assert config.global_batch_size is not None
    batch = config.global_batch_size
    sequences = sum((tokens.split("train").n_tokens - 1) // seq_len for tokens in known)
    epoch = max(1, math.ceil(sequences / batch))
    steps = config.max_steps or math.ceil((config.epochs or 1.0) * epoch)
    steps *= phases(plan.model.n_layer) if config.mode == "gradual" else 1
    steps *= len(config.lr_grid or (config.optimizer.lr,))
    tokens = steps * batch * seq_len
    masked = tokens * plan.masked_flops_per_token
    active = masked if config.mode == "dense" else tokens * plan.flops_per_token
    return Work(steps, tokens, active, masked)
