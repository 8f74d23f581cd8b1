"""Whether a configuration may go on from a checkpoint of another one."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.train.manifest import read_manifest

# Keys that do not change what is computed: where things go, how often they are saved or shown,
# and how the same global batch is laid out over ranks.
FREE = (
    "name",
    "output_dir",
    "stop_at",
    "peak_tflops",
    "micro_batch_size",
    "data.*.path",
    "checkpoint.*",
    "timeouts.*",
    "optimizer.max_nonfinite_steps",
    "optimizer.on_nonfinite",
    "optimizer.max_rollbacks",
    "evaluation.final",
    "logging.*",
    "deepspeed.zero_stage",
    "deepspeed.offload_optimizer",
    "deepspeed.reduce_bucket_size",
    "deepspeed.allgather_bucket_size",
    "deepspeed.overlap_comm",
    "deepspeed.param_persistence_threshold",
    "model.compile",
    "model.activation_checkpointing",
    "model.loss_chunk",
    "sparsity.kernel",
    "sparsity.storage",
)
# With patience, which weights are the best and where a run ends hang on the validations.
FREE_WITHOUT_PATIENCE = ("evaluation.every", "evaluation.sequences")


def check_drift(path: Path, identity: dict[str, Any], allowed: tuple[str, ...]) -> None:
    """Compare a run's identity with that of the checkpoint at `path`.

    Raises `UserError` naming every key that differs, with both values, and how to allow it.
    """
    try:
        saved = read_manifest(path)
        before, now = _flatten(saved["config"]), _flatten(identity["config"])
        data, batch = saved["data"], saved["global_batch_size"]
        before["precision"], before["source"] = saved["precision"], saved["source"]
    except KeyError as error:
        raise UserError(f"broken checkpoint {path}: manifest.json: {error!r}") from None
    now["precision"], now["source"] = identity["precision"], identity["source"]  # as resolved
    for flat in (before, now):
        flat.pop("global_batch_size", None)  # compared as resolved for the number of ranks
    if batch != identity["global_batch_size"]:
        raise UserError(
            f"the checkpoint {path} was made with a global batch of {batch} sequences, this run "
            f"has {identity['global_batch_size']}; every schedule counts steps of that batch: set "
            f"global_batch_size={batch}, or start anew in another output_dir"
        )
    free = (*FREE, *allowed)
    if before.get("evaluation.patience") is None and now.get("evaluation.patience") is None:
        free += FREE_WITHOUT_PATIENCE
    changed = {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(fnmatchcase(key, glob) for glob in free)
    }
    if data != identity["data"] and "data" not in allowed:
        changed["data"] = ("the shards it was trained on", "other shards (their index differs)")
    if changed:
        listed = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise UserError(
            f"the checkpoint {path} is of another config: {listed}. Go on with the saved values, "
            f"start anew in another output_dir, or allow it with checkpoint.allow_changed="
            f"[{', '.join(changed)}]"
        )


def conversion(manifest: dict[str, Any], zero_stage: int, world_size: int) -> str:
    """What resuming on another layout changes, in words; empty for the same one."""
    settings = manifest["config"].get("deepspeed")
    ranks = manifest.get("world_size")
    stage = settings.get("zero_stage") if isinstance(settings, dict) else None
    if ranks is None or stage is None:
        raise UserError(
            "broken checkpoint: its manifest.json lacks world_size or config.deepspeed.zero_stage"
        )
    if (ranks, stage) == (world_size, zero_stage):
        return ""
    before, now = (
        f"{many} rank{'s' * (many > 1)}, ZeRO {zero}"
        for many, zero in ((ranks, stage), (world_size, zero_stage))
    )
    text = f"{before} -> {now}: weights, moments, masks and the position in the data are exact"
    return text + ("; generators of dropout start anew" if ranks != world_size else "")


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(value, dict | list) for value in tree):
        items = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat
