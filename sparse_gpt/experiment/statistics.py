"""Statistics over seeds: means, paired differences, and tests corrected for their number.

Runs with the same seed saw the same data in the same order, so arms are compared seed by seed
and what the seeds have in common cancels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of confidence intervals
ALPHA = 0.05  # of tests, after Holm's correction
MOST_FLIPS = 16  # pairs; 2^16 sign patterns


@dataclass(frozen=True)
class Summary:
    """Mean of n values; spread and t interval only where there is more than one."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """Differences first - second on common seeds.

    `p` is of the two-sided paired t test. `p_sign_flip` is of the exact permutation test that
    flips the signs of the differences (Fisher); with n pairs it cannot be below `2 / 2^n`.
    Both are None where they cannot be computed: one pair, or differences all equal and not zero.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p: float | None
    p_sign_flip: float | None

    @property
    def n(self) -> int:
        return len(self.seeds)


def summarise(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Mean, standard deviation (n - 1) and the t interval of the mean; values must be finite."""
    if not values:
        raise ValueError("no values to summarise")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = float(np.std(np.asarray(values, dtype=np.float64), ddof=1))
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def paired(
    first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL
) -> Paired | None:
    """Compare two arms, given as {seed: loss}, on their common seeds; None where there are none."""
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    differences = tuple(first[seed] - second[seed] for seed in seeds)
    summary = summarise(differences, level)
    p = p_flip = None
    if not any(differences):
        p = p_flip = 1.0 if len(seeds) > 1 else None
    elif summary.sd:
        t = summary.mean / (summary.sd / math.sqrt(summary.n))
        p = float(2 * stats.t.sf(abs(t), summary.n - 1))
        p_flip = sign_flip(differences)
    return Paired(
        seeds, differences, summary.mean, summary.sd, summary.low, summary.high, p, p_flip
    )


def sign_flip(differences: Sequence[float]) -> float | None:
    """Two-sided p of the exact sign-flip test of mean 0; None for more than `MOST_FLIPS` pairs."""
    n = len(differences)
    if not 1 < n <= MOST_FLIPS:
        return None
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    sums = np.abs(signs @ np.asarray(differences, dtype=np.float64))
    observed = abs(math.fsum(differences))
    # A pattern that ties with the observed one must count although it sums in another order.
    tolerance = 1e-12 * math.fsum(map(abs, differences))
    return float(np.mean(sums >= observed - tolerance))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: controls the chance of any false finding. None stays None."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = largest
    return adjusted


def perplexity(loss: float) -> float:
    """exp(loss in nats a token); infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
