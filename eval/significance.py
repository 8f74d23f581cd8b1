"""Is one model's score on the same documents higher than another's? Paired by document.

A column's score is a weighted mean over documents: 1 / n each, for MMLU 1 / (57 n) with n the
questions of the subject. What both models find easy or hard cancels in the differences, so the
standard error is smaller than that of two independent runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sparse_gpt.errors import UserError

FLIPS = 9_999  # random sign patterns of the permutation test
_AT_ONCE = 1 << 22  # signs in memory at a time


@dataclass(frozen=True)
class Comparison:
    """Of one column, in fractions: `stderr` of the difference, None for a single document.

    `p` is two-sided, of the hypothesis that the models could be exchanged on every document.
    test: "McNemar" (exact binomial test on the documents that only one answers) where every
    document weighs the same and scores 0 or 1, else "sign flips" (`FLIPS` random ones).
    """

    difference: float
    stderr: float | None
    p: float
    test: str
    documents: int


@dataclass(frozen=True)
class Differences:
    """By document, in strata (the subjects of MMLU) that weigh the same."""

    strata: tuple[np.ndarray, ...]

    @property
    def values(self) -> np.ndarray:
        return np.concatenate(self.strata)

    @property
    def weights(self) -> np.ndarray:
        share = 1 / len(self.strata)
        return np.concatenate([np.full(len(part), share / len(part)) for part in self.strata])

    def stderr(self) -> float | None:
        """Of the mean over strata; each contributes the error of its own mean."""
        if any(len(part) < 2 for part in self.strata):
            return None
        errors = [part.var(ddof=1) / len(part) for part in self.strata]
        return float(np.sqrt(np.sum(errors)) / len(self.strata))


def differences(column: dict[str, Any], base: dict[str, Any]) -> Differences | None:
    """Scores of `column` less those of `base`, two columns of result files.

    None where outcomes are missing (older files) or are of other documents.
    """
    strata = []
    for one, other in zip(_parts(column), _parts(base)):
        if one is None or other is None or one["metric"] != other["metric"]:
            return None
        if one["documents_sha256"] != other["documents_sha256"]:
            return None
        strata.append(_values(one) - _values(other))
    return Differences(tuple(strata))


def compare(found: Differences) -> Comparison:
    """Difference, error and p of one column."""
    values, weights = found.values, found.weights
    exact = len(found.strata) == 1 and set(np.unique(values)) <= {-1.0, 0.0, 1.0}
    if exact:
        better, worse = int((values > 0).sum()), int((values < 0).sum())
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    else:
        p = sign_flips(values * weights)
    return Comparison(
        float(values @ weights),
        found.stderr(),
        p,
        "McNemar" if exact else "sign flips",
        len(values),
    )


def average(columns: Sequence[Differences]) -> Comparison:
    """The same for the plain mean of several columns, over the documents of all."""
    parts = [found.values * found.weights / len(columns) for found in columns]
    errors = [found.stderr() for found in columns]
    known = [error for error in errors if error is not None]
    stderr = float(np.sqrt(np.sum(np.square(known))) / len(columns))
    return Comparison(
        float(np.concatenate(parts).sum()),
        stderr if len(known) == len(errors) else None,
        sign_flips(np.concatenate(parts)),
        "sign flips",
        sum(map(len, parts)),
    )


def sign_flips(terms: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a sum under random signs of its terms; at least 1 / (FLIPS + 1).

    The observed signs count as one of the patterns (Phipson and Smyth, 2010).
    """
    terms = terms[terms != 0]
    if not len(terms):
        return 1.0
    observed = abs(terms.sum())
    # A pattern that ties with the observed one must count although it sums in another order.
    least = observed - 1e-12 * np.abs(terms).sum()
    draw = np.random.default_rng(seed)
    reached, left = 0, FLIPS
    while left:
        count = min(left, max(1, _AT_ONCE // len(terms)))
        signs = draw.integers(0, 2, (count, len(terms)), dtype=np.int8)
        # sum of s t with s = 2 b - 1
        sums = 2 * (signs @ terms) - terms.sum()
        reached += int((np.abs(sums) >= least).sum())
        left -= count
    return (1 + reached) / (1 + FLIPS)


def _parts(column: dict[str, Any]) -> list[dict[str, Any] | None]:
    subjects = column.get("subjects")
    entries = [column] if subjects is None else [subjects[name] for name in sorted(subjects)]
    return [entry.get("outcomes") for entry in entries]


def _values(outcomes: dict[str, Any]) -> np.ndarray:
    values = outcomes["values"]
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError):
        raise UserError("a result file has outcomes that are no numbers") from None
