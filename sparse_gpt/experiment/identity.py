"""Which run a record is of: what is computed, without paths, names and layout."""

import hashlib
import json
from fnmatch import fnmatchcase
from typing import Any

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.spec import LeaderboardStage
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.train.drift import FREE, FREE_WITHOUT_PATIENCE

AnyConfig = RunConfig | FinetuneConfig | LeaderboardStage
# What records have never held; with more in it, the digests of all runs so far would be others.
FREE_OF_PRETRAINING = (*FREE, *FREE_WITHOUT_PATIENCE, "deepspeed.*")
# Of a fine-tuning. How often it is validated decides which weights are its best.
FREE_OF_FINETUNING = (
    *("name", "output_dir", "checkpoint", "data.*.path", "checkpointing.*", "logging.*"),
    *("micro_batch_size", "deepspeed.*", "activation_checkpointing", "keep_checkpoints"),
    *("storage", "kernel", "evaluation.final"),
)
FREE_OF_EVALUATION = ("arms", "data", "batch_size", "device")


def config_tree(config: AnyConfig) -> dict[str, Any]:
    """The resolved configuration of what is computed, as a plain tree."""
    tree = json.loads(config.model_dump_json())
    if not isinstance(config, LeaderboardStage):
        tree["data"] = [{**source, "path": ""} for source in tree["data"]]
    return _part(tree, _free(config), free=False)


def tree_sha256(tree: dict[str, Any]) -> str:
    """Digest of a plain tree, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def changes(saved: dict[str, Any], config: AnyConfig) -> list[str]:
    """Where a saved `config_tree` is of another run, as `key: old -> new`; empty for the same.

    Keys that came into the configuration since count as if they had had their defaults.
    """
    tree = json.loads(config.model_dump_json())
    whole = overlaid(_part(tree, _free(config), free=True), saved)
    try:
        before = config_tree(validate(type(config), whole, "record"))
    except UserError as error:
        return [f"its configuration is no longer understood ({error})"]
    old, new = _flat(before), _flat(config_tree(config))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _free(config: AnyConfig) -> tuple[str, ...]:
    if isinstance(config, LeaderboardStage):
        return FREE_OF_EVALUATION
    return FREE_OF_PRETRAINING if isinstance(config, RunConfig) else FREE_OF_FINETUNING


def _part(
    tree: dict[str, Any], globs: tuple[str, ...], free: bool, prefix: str = ""
) -> dict[str, Any]:
    """The keys of `globs`, which change nothing of what is computed (`free`), or all others."""
    part = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        matches = any(fnmatchcase(path + end, glob) for glob in globs for end in ("", "."))
        if matches or not isinstance(value, dict):
            if matches == free:
                part[key] = value
        elif below := _part(value, globs, free, f"{path}."):
            part[key] = below
    return part


def overlaid(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `over`; mappings in both are joined."""
    joined = {**tree, **over}
    for key in tree.keys() & over.keys():
        if isinstance(tree[key], dict) and isinstance(over[key], dict):
            joined[key] = overlaid(tree[key], over[key])
    return joined


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
