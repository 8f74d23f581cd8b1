"""What a reader must know before believing the numbers: missing runs, unequal conditions."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sparse_gpt.experiment.arms import arms, baseline_name
from sparse_gpt.experiment.results import Record, Results

# Parts of a resolved configuration that say where a run lies or what it logs, not what it computes.
UNIMPORTANT = ("name", "output_dir", "seed", "logging", "checkpoint", "wandb")
MOST_NAMED = 8


def warnings(results: Results) -> list[str]:
    """One sentence a problem, the gravest first."""
    records = results.records
    found = [f"Refused: {reason}." for reason in results.refused]
    found += _missing(results)
    for stage in ("pretrain", "finetune"):
        for arm in arms(results, stage):
            if arm.diverged():
                seeds = ", ".join(map(str, arm.diverged()))
                found.append(
                    f"{arm.title} has no finite loss with seed {seeds}: these runs diverged "
                    "or were not measured, and are left out of means and tests."
                )
            found += _seeds_differ(arm.title, list(arm.runs.values()))
    found += _data(records)
    found += _edges(records)
    found += _unplanned_differences(results)
    for name, values in (
        ("git revision", [git_revision(record)[:12] for record in records]),
        ("software version", [json.dumps(r.versions, sort_keys=True) for r in records]),
        ("device", [json.dumps(record.device, sort_keys=True) for record in records]),
        ("number of ranks", [str(record.ranks) for record in records]),
    ):
        kinds = sorted(set(values))
        if len(kinds) > 1:
            found.append(f"The runs are of more than one {name}: {_some(kinds)}.")
    dirty = [r.run for r in records if isinstance(r.git, dict) and r.git.get("dirty")]
    if dirty:
        found.append(f"Run with uncommitted changes: {_some(dirty)}.")
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(name[:80] for name in listed[:MOST_NAMED]) + more


def _missing(results: Results) -> list[str]:
    found = []
    if results.missing:
        names = _some(run.run for run in results.missing)
        found.append(
            f"{len(results.missing)} of {len(results.plan or [])} planned runs have no record: "
            f"{names}."
        )
    base = baseline_name(results)
    if results.records and base not in {record.arm for record in results.records}:
        found.append(f"The baseline {base} has no record, so nothing is compared with it.")
    return found


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as {dotted key: value}."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _important(record: Record) -> dict[str, Any]:
    return {k: v for k, v in flat(record.config).items() if k.split(".")[0] not in UNIMPORTANT}


def _differences(first: Record, second: Record) -> list[str]:
    """Keys with unequal values in two resolved configurations."""
    one, two = _important(first), _important(second)
    absent = object()
    keys = sorted(one.keys() | two.keys())
    return [key for key in keys if one.get(key, absent) != two.get(key, absent)]


def _seeds_differ(title: str, runs: list[Record]) -> list[str]:
    keys = sorted({key for run in runs[1:] for key in _differences(runs[0], run)})
    if runs[0].stage == "finetune":  # each chose its own lr, from its own checkpoint
        keys = [key for key in keys if key not in ("optimizer.lr", "checkpoint")]
    return [f"The seeds of {title} differ in more than the seed: {_some(keys)}."] if keys else []


def _data(records: list[Record]) -> list[str]:
    by_stage: dict[str, dict[str, list[str]]] = {}
    for record in records:
        kinds = by_stage.setdefault(record.stage, {})
        kinds.setdefault(json.dumps(record.data, sort_keys=True), []).append(record.run)
    found = []
    for stage, kinds in by_stage.items():
        if len(kinds) > 1:
            odd = min(kinds.values(), key=len)
            found.append(
                f"Runs of stage {stage} saw different data or tokenizers ({_some(odd)} unlike the "
                "others): their losses cannot be compared."
            )
    return found


def _edges(records: list[Record]) -> list[str]:
    """Grids of learning rates whose best is their first or last: a better one may lie outside."""
    by_edge: dict[str, list[str]] = {}
    for record in records:
        tuned = record.finetune
        rates = sorted(float(rate) for rate in (tuned.lr_grid or {})) if tuned else []
        if tuned and len(rates) > 1 and tuned.lr in (rates[0], rates[-1]):
            edge = "lowest" if tuned.lr == rates[0] else "highest"
            by_edge.setdefault(edge, []).append(record.run)
    return [
        f"The best learning rate is the {edge} of the grid in {_some(runs)}; one outside may be "
        "better."
        for edge, runs in by_edge.items()
    ]


def _unplanned_differences(results: Results) -> list[str]:
    """Keys outside an arm's own settings in which it differs from the baseline."""
    found = []
    main = {arm.name: arm for arm in arms(results, "pretrain")}
    base = main.get(baseline_name(results) or "")
    for arm in main.values():
        if base is None or arm is base:
            continue
        own = [*arm.any.settings, *base.any.settings, *_matched(arm.any), *_matched(base.any)]
        keys = [
            key
            for key in _differences(arm.any, base.any)
            if not any(key == k or key.startswith(f"{k}.") for k in own)
        ]
        if keys:
            found.append(
                f"{arm.label} differs from {base.label} in keys that are not among its settings: "
                f"{_some(keys)}."
            )
    return found


def _matched(record: Record) -> list[str]:
    """Keys by which the arm was given another's FLOPs."""
    settings = (record.match or {}).get("settings")
    return list(settings) if isinstance(settings, dict) else []


def git_revision(record: Record) -> str:
    """The revision; `unknown` where it was not recorded."""
    if isinstance(record.git, dict):
        return str(record.git.get("revision") or record.git.get("commit") or "unknown")
    return str(record.git or "unknown")
