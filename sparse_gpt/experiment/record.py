"""One finished run as a small JSON file, and whether it is the run that is wanted now."""

from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.finetune_stage import FinetuneRun
from sparse_gpt.experiment.identity import changes, config_tree, tree_sha256
from sparse_gpt.experiment.leaderboard_stage import LeaderboardRun
from sparse_gpt.experiment.plan import Run, layer_flops
from sparse_gpt.experiment.results import LARGEST_FILE, checked
from sparse_gpt.experiment.sessions import Sessions
from sparse_gpt.json_file import read_object, read_objects
from sparse_gpt.train.results import FILE as RESULTS
from sparse_gpt.train.results import SPLITS, read_results

LaterRun = FinetuneRun | LeaderboardRun  # after a pretraining, `after`
AnyRun = Run | LaterRun
SCHEMA = 1
NEEDED = {"config": dict, "data": dict, "seconds": int | float, "loss": dict}
PACKAGES = ("torch", "deepspeed", "numpy", "sparse_gpt")


class Records:
    """The records of one experiment, `<results>/<name>/runs/<run>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: str) -> Path:
        return self.folder / "runs" / f"{run}.json"

    def read(self, run: str) -> dict[str, Any] | None:
        """A record; None where there is none. `UserError` for a file that is none."""
        path = self.path(run)
        try:
            record = read_object(path, LARGEST_FILE)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: no JSON ({error}); remove it, and the run is repeated"
            ) from None
        if record.get("schema") != SCHEMA:
            raise UserError(f"{path}: no record of schema {SCHEMA}; move it away")
        try:
            checked(record)
        except UserError as error:
            raise UserError(f"{path}: {error}; remove it, and the run is repeated") from None
        wrong = [key for key, kind in NEEDED.items() if not isinstance(record.get(key), kind)]
        if wrong:
            raise UserError(f"{path}: a record needs {', '.join(wrong)}; move it away")
        return record

    def why_not_done(self, run: AnyRun, corpora: Corpora) -> str | None:
        """None where the record is of this run; "" where there is none, else what differs."""
        record = self.read(run.name)
        if record is None:
            return ""
        differing = changes(record.get("config", {}), run.config)
        if record.get("after_sha256") != run.after_sha256:
            differing.append("the run before it is another")
        differing += _other_data(record["data"], run.corpora, corpora)
        if not isinstance(run, Run):
            before = _other_data(record.get("after_data"), run.after.corpora, corpora)
            differing += [f"the run before it: {text}" for text in before]
        return "; ".join(differing) or None

    def write(
        self, run: AnyRun, corpora: Corpora, make: Callable[[Any, Corpora], dict[str, Any]]
    ) -> dict[str, Any]:
        """`make` and write the record of a run that has ended."""
        record = make(run, corpora)
        self.path(run.name).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path(run.name), record)
        return record


def _other_data(was: object, names: Iterable[str], corpora: Corpora) -> list[str]:
    """In what the data of a record differs from what is there, or would be prepared."""
    differing = []
    for name in names:
        part = was.get(name) if isinstance(was, dict) else None
        part = part if isinstance(part, dict) else {}
        if part.get("settings_sha256") != corpora.settings_sha256(name):
            differing.append(f"data.{name}: prepared otherwise")
            continue
        data = corpora.opened(name)
        if data is not None and data.identity != part.get("identity"):
            differing.append(f"data.{name}: other tokens (another text or tokenizer)")
    return differing


def make_record(run: Run, corpora: Corpora) -> dict[str, Any]:
    """What the folder of a finished run says. Raises `UserError` where a part is missing."""
    results = read_results(run.folder / RESULTS)
    if results is None:
        raise UserError(f"{run.folder / RESULTS} is missing; the run has not ended")
    return _record(run, corpora, results)


def diverged_record(run: Run, corpora: Corpora) -> dict[str, Any] | None:
    """The record of a run that gave up over numbers that are not finite; None where it did not.

    It has no losses, and says why. Its weights are not measured.
    """
    path = run.folder / "metrics.jsonl"
    last, ended = None, None
    for last in read_log(path) if path.is_file() else ():
        ended = last if "flops_spent" in last else ended
    if last is None or last["kind"] != "diverged":
        return None
    results: dict[str, Any] = {
        "steps": last["step"],
        "tested_step": None,
        "tokens": ended["tokens"] if ended else 0,
        "flops_spent": ended["flops_spent"] if ended else 0,
        "sparse_layer_weights": 0,
        "active_weights": 0,
        "precision": run.config.precision,
        "device": "unknown",
        "ranks": None,
    }
    return {**_record(run, corpora, results), "diverged": last["because"]}


def _record(run: Run, corpora: Corpora, results: dict[str, Any]) -> dict[str, Any]:
    folder, plan = run.folder, run.plan
    metrics = read_log(folder / "metrics.jsonl")
    model = plan.model
    updates = sum(line["kind"] == "topology" and line["step"] > 0 for line in metrics)
    weights = results["sparse_layer_weights"]
    return {
        **about_run(run, corpora, folder, results),
        "storage": run.config.sparsity.storage,
        "model": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "d_model": model.d_model,
            "d_ff": model.d_ff,
            "d_embed": model.d_embed,
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "sparsity_nominal": plan.sparsity,
            "sparsity": 1 - results["active_weights"] / weights if weights else 0.0,
        },
        "topology_updates": updates,
        "flops": {
            "spent": results["flops_spent"],
            "per_sequence": plan.flops_per_sequence,
            "sparsified_layers_per_sequence": layer_flops(plan),
            "ratio_layers": run.ratio_layers,
            "ratio_model": results["flops_spent"] / run.baseline.flops_total,
        },
    }


def about_run(
    run: AnyRun, corpora: Corpora, folder: Path, results: dict[str, Any]
) -> dict[str, Any]:
    """What records of all stages have. `folder`: where the metrics of what was tested lie."""
    environment, tree = read_json(folder / "environment.json"), config_tree(run.config)
    sessions = Sessions(run.folder)
    splits = {split: results[split] for split in SPLITS if split in results}
    return {
        "schema": SCHEMA,
        "experiment": run.experiment,
        "run": run.name,
        "arm": run.arm,
        "label": run.label,
        "group": run.group,
        "seed": run.seed,
        "stage": run.stage,
        "settings": run.settings,
        "match": None if run.match is None else run.match.as_dict(),
        "config_sha256": tree_sha256(tree),
        "config": tree,
        "after_sha256": run.after_sha256,
        "data": describe_data(run.corpora, corpora),
        "git": {
            "revision": environment["git_revision"],
            "dirty": bool(environment.get("uncommitted")),
        },
        "versions": {"python": environment["python"].split()[0], **_versions()},
        "device": (environment["devices"] or [results["device"]])[0],
        "precision": results["precision"],
        "threads": environment["threads"],
        "ranks": results["ranks"],
        "seconds": sessions.seconds,
        "started": sessions.started,
        "finished": sessions.finished,
        "resumed": sessions.resumed,
        "steps": results["steps"],
        "tested_step": results["tested_step"],
        "tokens": results["tokens"],
        "loss": {split: part["loss"] for split, part in splits.items()},
        "word_perplexity": {split: part["word_perplexity"] for split, part in splits.items()},
        "curve": [
            [line["step"], line["tokens"], line["flops_spent"], line["loss"]]
            for line in read_log(folder / "metrics.jsonl")
            if line["kind"] == "validation"
        ],
    }


def describe_data(names: Iterable[str], corpora: Corpora) -> dict[str, Any]:
    """By name: what was trained on, and what it would be known again by."""
    return {name: _describe_data(name, corpora) for name in names}


def _describe_data(name: str, corpora: Corpora) -> dict[str, Any]:
    data = corpora.opened(name)
    if data is None:
        raise UserError(f"data.{name}: {corpora.path(name)} has gone while runs were using it")
    return {
        "tokens": {split: tokens.n_tokens for split, tokens in data.splits.items()},
        "words": {split: tokens.n_words for split, tokens in data.splits.items()},
        "vocab_size": data.vocab_size,
        "tokenizer_sha256": data.tokenizer_sha256,
        "identity": data.identity,
        "settings_sha256": corpora.settings_sha256(name),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # used from a checkout; the git revision says which
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove the run's folder to repeat the run") from None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's log, one at a time."""
    try:
        yield from read_objects(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove the run's folder to repeat the run") from None
