"""From an experiment to the ordered list of its runs, each with a resolved configuration."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import read_tree, set_key, validate
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.identity import overlaid
from sparse_gpt.experiment.match import Match, match_flops
from sparse_gpt.experiment.spec import Experiment
from sparse_gpt.plan import Plan, plan


@dataclass(frozen=True)
class Run:
    """One run. `settings`: its arm's overrides; `match`: whose FLOPs it was given, if any.

    `baseline`: the plan of the baseline arm's run, which ratios are over.
    """

    experiment: str
    arm: str
    label: str
    group: str
    seed: int
    settings: dict[str, Any]
    match: Match | None
    config: RunConfig
    plan: Plan
    baseline: Plan
    corpora: tuple[str, ...]  # of the experiment, that it reads
    stage: str = "pretrain"
    after_sha256: None = None  # of the run before it: there is none

    @property
    def name(self) -> str:
        """`<arm>-s<seed>`; of files and folders."""
        return f"{self.arm}-s{self.seed}"

    @property
    def row(self) -> str:
        """What runs that differ in the seed alone have in common."""
        return self.arm

    @property
    def folder(self) -> Path:
        """Checkpoints, log and metrics."""
        return self.config.run_dir

    def metric_folders(self) -> list[Path]:
        """Where logs of metrics lie: what they count is what `plan.steps` counts."""
        return [self.folder]

    def arguments(self, config: Path) -> list[str]:
        """Of the script that runs it."""
        return [str(config), "checkpoint.resume=auto"]

    @property
    def ratio_model(self) -> float:
        """FLOPs of the whole run over the baseline's."""
        return self.plan.flops_total / self.baseline.flops_total

    @property
    def ratio_layers(self) -> float:
        """The same of the sparsified layers, at their final sparsity."""
        mine, base = (
            layer_flops(plan) * plan.steps * plan.global_batch_size
            for plan in (self.plan, self.baseline)
        )
        return mine / base


def layer_flops(plan: Plan) -> int:
    """Forward and backward FLOPs of a sequence in the layers that are sparse, or could be."""
    return 6 * plan.seq_len * plan.layer_residual.active


class Planner:
    """Resolves the arms of one experiment; runs lie below `work`."""

    def __init__(self, experiment: Experiment, work: Path) -> None:
        self.experiment, self.work = experiment, work
        self.corpora = Corpora(experiment, work)
        self._base = overlaid(
            read_tree(experiment.base_config) if experiment.base_config else {},
            copy.deepcopy(experiment.base),
        )
        self._used = self._name_corpora()
        if not self._used:
            raise UserError("base.data: names no corpus of the experiment's data section")
        self._vocab_size = self.corpora.vocab_size(self._used[0])
        self._matches: dict[str, Match] = {}

    def runs(self) -> list[Run]:
        """Every run: all arms of the first seed, then of the next."""
        arms = self.experiment.arms
        seeds = dict.fromkeys(s for arm in arms for s in self.experiment.seeds_of(arm))
        return [
            self.run(arm, seed)
            for seed in sorted(seeds)
            for arm in arms
            if seed in self.experiment.seeds_of(arm)
        ]

    def run(self, arm: str, seed: int) -> Run:
        """One run, resolved. Raises `UserError` naming the arm where settings do not fit."""
        experiment = self.experiment
        config = self._config(arm, seed)
        return Run(
            experiment=experiment.name,
            arm=arm,
            label=experiment.label_of(arm),
            group=experiment.arms[arm].group,
            seed=seed,
            settings=self._settings(arm),
            match=self._match(arm),
            config=config,
            plan=self._plan(config),
            baseline=self._baseline,
            corpora=self._used,
        )

    @cached_property
    def _baseline(self) -> Plan:
        """No number of a plan depends on the seed."""
        return self._plan(self._config(self.experiment.baseline, seed=0))

    def _settings(self, arm: str) -> dict[str, Any]:
        """The overrides of an arm as given, with those of the arm it is like."""
        spec = self.experiment.arms[arm]
        below: dict[str, Any] = {}
        if spec.match_flops is not None:
            below = self._settings(self.experiment.baseline)
        elif spec.like is not None:
            below = self._settings(spec.like)
        return {**below, **spec.settings}

    def _match(self, arm: str) -> Match | None:
        """What gives an arm the FLOPs of another, or of the one it has its settings from."""
        spec = self.experiment.arms[arm]
        if spec.match_flops is None:
            return self._match(spec.like) if spec.like is not None else None
        assert spec.like is not None
        if arm not in self._matches:
            target = self._plan(self._config(spec.like, seed=0)).flops_total
            self._matches[arm] = match_flops(
                lambda changes: self._validated(arm, 0, changes),
                lambda config: self._plan(config).flops_total,
                spec.match_flops,
                spec.like,
                target,
                self.experiment.ranks,
            )
        return self._matches[arm]

    def _config(self, arm: str, seed: int) -> RunConfig:
        match = self._match(arm)
        return self._validated(arm, seed, match.settings if match is not None else {})

    def _validated(self, arm: str, seed: int, changes: Mapping[str, Any]) -> RunConfig:
        tree = copy.deepcopy(self._base)
        for key, value in {**self._settings(arm), **changes}.items():
            for keys, leaf in _leaves(key.split("."), value):
                set_key(tree, keys, copy.deepcopy(leaf), f"arms.{arm}.settings.{key}")
        name = f"{arm}-s{seed}"
        evaluation = tree.get("evaluation") or {}
        tree |= {"name": name, "output_dir": str(self.work / name), "seed": seed}
        tree["evaluation"] = {**evaluation, "final": True}
        config = validate(RunConfig, tree, f"arms.{arm}")
        if config.global_batch_size is None:  # of these ranks; a run is known by it
            tree["global_batch_size"] = config.batch(self.experiment.ranks)
            config = validate(RunConfig, tree, f"arms.{arm}")
        return config

    def _plan(self, config: RunConfig) -> Plan:
        return plan(config, self._vocab_size, self.experiment.ranks)

    def _name_corpora(self) -> tuple[str, ...]:
        """Put folders for the names of corpora in `base.data`; returns the names."""
        corpora = self.experiment.data
        if "data" not in self._base and len(corpora) == 1:
            self._base["data"] = [{"path": next(iter(corpora))}]
        used = []
        for entry in self._base.get("data") or ():
            if isinstance(entry, dict) and entry.get("path") in corpora:
                used.append(entry["path"])
                entry["path"] = str(self.corpora.path(entry["path"]))
        return tuple(used)


def _leaves(keys: list[str], value: Any) -> list[tuple[list[str], Any]]:
    """A setting's mappings written out: `{type: block}` below `structure` leaves the rest."""
    if not isinstance(value, dict) or not value:
        return [(keys, value)]
    return [leaf for key, below in value.items() for leaf in _leaves([*keys, key], below)]
