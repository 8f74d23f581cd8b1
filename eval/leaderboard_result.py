"""From lm-eval's numbers of single tasks to the columns and the average of the leaderboard."""

import hashlib
from typing import TYPE_CHECKING, Any

from eval import leaderboard_tasks
from eval.leaderboard_tasks import LeaderboardTask

if TYPE_CHECKING:
    from eval.harness import Outcome


def entry(name: str, metric: str, outcome: "Outcome", pool: int) -> dict[str, Any]:
    """The numbers of one lm-eval task: see the schema in `report.py`.

    pool: how many documents few-shot examples are drawn from.
    """
    from eval import harness

    score, stderr = outcome.metric(name, metric)
    return {
        "score": score,
        "stderr": stderr,
        "shots": outcome.shots[name],
        "version": outcome.versions[name],
        "documents": outcome.samples[name]["effective"],
        "documents_available": outcome.samples[name]["original"],
        "few_shot_pool": pool,
        "requests": outcome.requests[name],
        "truncated": outcome.truncated[name],
        "metrics": harness.plain_metrics(outcome.results[name]),
        "outcomes": outcomes(outcome.documents[name], metric),
    }


def outcomes(documents: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """What each document scored, in the order of the data, and a digest of the documents.

    `values` is text of 0 and 1 where there is nothing else, a list of numbers otherwise.
    """
    ordered = sorted(documents, key=lambda document: document["doc_id"])
    digest = hashlib.sha256("".join(document["doc_hash"] for document in ordered).encode())
    values = [float(document[metric]) for document in ordered]
    flat = set(values) <= {0.0, 1.0}
    return {
        "metric": metric,
        "documents_sha256": digest.hexdigest(),
        "values": "".join(str(int(value)) for value in values) if flat else values,
    }


def column(task: LeaderboardTask, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One column of the table from the entries of its lm-eval tasks."""
    parts = [entries[name] for name in task.tasks]
    total = {
        key: sum(part[key] for part in parts)
        for key in ("documents", "documents_available", "few_shot_pool", "requests", "truncated")
    }
    score, stderr = mean_of([(part["score"], part["stderr"]) for part in parts])
    result = {
        "score": score,
        "stderr": stderr,
        "metric": task.metric,
        "tasks": list(task.tasks),
        "shots": parts[0]["shots"],
        "version": parts[0]["version"],
        **total,
        "documents_official": task.documents,
        "few_shot_pool_official": task.pool if parts[0]["shots"] else 0,
        "truncated_share": total["truncated"] / total["requests"],
    }
    if len(parts) == 1:
        return {**result, "metrics": parts[0]["metrics"], "outcomes": parts[0]["outcomes"]}
    weighted = sum(part["score"] * part["documents"] for part in parts)
    result["score_by_size"] = weighted / total["documents"]
    subjects = {name.removeprefix("mmlu_"): part for name, part in zip(task.tasks, parts)}
    return {**result, "subjects": subjects}


def mean_of(values: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The plain mean of independent scores and its standard error; None if one has none."""
    score = sum(value for value, _ in values) / len(values)
    errors = [error for _, error in values if error is not None]
    if len(errors) < len(values):
        return score, None
    return score, sum(error**2 for error in errors) ** 0.5 / len(values)


def average(columns: dict[str, dict[str, Any]]) -> dict[str, float | None] | None:
    """The leaderboard's average: the plain mean of five columns, None where one is missing."""
    if set(columns) != set(leaderboard_tasks.TASKS):
        return None
    score, stderr = mean_of([(part["score"], part["stderr"]) for part in columns.values()])
    return {"score": score, "stderr": stderr}


def notes(columns: dict[str, dict[str, Any]], limit: int | None) -> list[str]:
    """What a reader must know before comparing the numbers with published ones."""
    lines = []
    if limit is not None:
        lines.append(f"only the first {limit} documents of each task were scored (--limit)")
    for key, part in columns.items():
        title = leaderboard_tasks.TASKS[key].title
        for what, have, official in (
            ("documents", part["documents_available"], part["documents_official"]),
            ("few-shot documents", part["few_shot_pool"], part["few_shot_pool_official"]),
        ):
            if have != official:
                lines.append(
                    f"{title}: the data has {have:,} {what}, the official set {official:,}"
                )
    return lines
