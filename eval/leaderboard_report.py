"""Tables of leaderboard results: scores, differences with their significance, truncation."""

from collections.abc import Sequence
from typing import Any

from eval import significance
from eval.markdown import percent, table
from sparse_gpt.experiment.statistics import ALPHA, holm

Result = dict[str, Any]
COLUMNS = {
    "arc": "ARC",
    "hellaswag": "HellaSwag",
    "truthfulqa": "TruthfulQA",
    "mmlu": "MMLU",
    "winogrande": "Winogrande",
}
# What costs as much as in the dense model: each sparsified layer, or the whole run.
ISO_FLOP = {"layer": "iso-FLOP per layer", "model": "iso-FLOP whole run"}


def leaderboard_table(results: Sequence[Result]) -> str:
    """Paper 001's Table 15: one row a model, five columns and their average, in percent.

    Two further tables give differences to the first model (with several) and the share of
    truncated requests.
    """
    origin = ["Transformation", "Sparsity", "Method"]
    header = ["Model", *origin, "Shots", *COLUMNS.values(), "Average"]
    rows = [
        [
            result["model"]["name"],
            *_origin(result),
            result["settings"]["shots"],
            *(percent(*_score(result, key)) for key in COLUMNS),
            percent(*_average(result)),
        ]
        for result in results
    ]
    parts = [table(header, rows)]
    if len(results) > 1:
        parts.append(_difference_table(results))
    rows = [[r["model"]["name"], *(percent(_share(r, key)) for key in COLUMNS)] for r in results]
    parts.append(
        "Requests truncated on the left to fit the context, in percent:\n\n"
        + table(["Model", *COLUMNS.values()], rows)
    )
    return "\n\n".join(parts)


def _difference_table(results: Sequence[Result]) -> str:
    base, rest = results[0], results[1:]
    header = ["Model", *COLUMNS.values(), "Average"]
    rows = []
    unpaired = False
    for result in rest:
        found = paired(result, base)
        tests = [found[key] for key in COLUMNS]
        adjusted = dict(zip(COLUMNS, holm([None if test is None else test.p for test in tests])))
        scores = [*((key, _score(result, key), _score(base, key)) for key in COLUMNS)]
        scores.append(("average", _average(result), _average(base)))
        cells, p_cells = [], []
        for key, one, other in scores:
            comparison = found[key]
            if comparison is None:
                unpaired |= one[0] is not None and other[0] is not None
                cells.append(percent(*_difference(one, other), signed=True))
                p_cells.append("-")
                continue
            p = comparison.p if key == "average" else adjusted[key]
            assert p is not None
            star = " *" if p < ALPHA else ""
            cells.append(percent(comparison.difference, comparison.stderr, signed=True) + star)
            p_cells.append(f"{p:.4f}" if p < 0.01 else f"{p:.2f}")
        rows += [[result["model"]["name"], *cells], ["  p", *p_cells]]
    text = (
        f"Difference to {base['model']['name']}, in points ± standard error, paired by document. "
        "p: exact McNemar test (ARC, HellaSwag, Winogrande) or sign flips (TruthfulQA, MMLU, "
        f"average), two-sided, Holm-corrected over a model's tasks; * below {ALPHA}. One training "
        "run a model: p is of the documents, and says nothing of other seeds."
    )
    if unpaired:
        text += (
            " Without p: results on other documents, or without outcomes; ± of two independent "
            "runs."
        )
    return f"{text}\n\n{table(header, rows)}"


def paired(result: Result, base: Result) -> dict[str, significance.Comparison | None]:
    """Comparisons by column and of the `average`; None where they cannot be made."""
    found: dict[str, significance.Comparison | None] = {}
    columns = []
    for key in COLUMNS:
        one, other = result["tasks"].get(key), base["tasks"].get(key)
        differences = None
        if one is not None and other is not None:
            differences = significance.differences(one, other)
        found[key] = None if differences is None else significance.compare(differences)
        columns.append(differences)
    known = [differences for differences in columns if differences is not None]
    complete = len(known) == len(COLUMNS)
    found["average"] = significance.average(known) if complete else None
    return found


def _difference(
    one: tuple[float | None, float | None], base: tuple[float | None, float | None]
) -> tuple[float | None, float | None]:
    if one[0] is None or base[0] is None:
        return None, None
    if one[1] is None or base[1] is None:
        return one[0] - base[0], None
    return one[0] - base[0], (one[1] ** 2 + base[1] ** 2) ** 0.5


def _origin(result: Result) -> tuple[str, str, str]:
    """Transformation (and what is iso-FLOP), sparsity and method, as exported; or dashes."""
    metadata = result["model"].get("sparse_gpt") or {}
    config = metadata.get("config") or {}
    sparsity = metadata.get("sparsity")
    if not isinstance(sparsity, int | float):
        return "-", "-", "-"
    ift = config.get("ift") or {}
    member = ift.get("member", "none")
    method = (config.get("sparsity") or {}).get("algorithm", "-") if sparsity else "-"
    name = f"sparse {member}" if member != "none" else ("sparse" if sparsity else "dense")
    if member != "none" and ift.get("iso_flop") in ISO_FLOP:
        name += f" ({ISO_FLOP[ift['iso_flop']]})"
    return name, f"{100 * sparsity:.1f}%", method


def _score(result: Result, key: str) -> tuple[float | None, float | None]:
    task = result["tasks"].get(key)
    return (task["score"], task["stderr"]) if task else (None, None)


def _average(result: Result) -> tuple[float | None, float | None]:
    average = result["average"]
    return (average["score"], average["stderr"]) if average else (None, None)


def _share(result: Result, key: str) -> float | None:
    task = result["tasks"].get(key)
    return task["truncated_share"] if task else None
