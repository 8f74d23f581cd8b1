"""Statistics over seeds against scipy and by their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparse_gpt.experiment.statistics import holm, paired, perplexity, sign_flip, summarise

SETTINGS = settings(deadline=None, max_examples=50)
LOSSES = st.lists(st.integers(2000, 6000).map(lambda n: n / 1000), min_size=2, max_size=9)


def test_a_single_value_has_neither_spread_nor_interval():
    summary = summarise([4.2])
    assert (summary.n, summary.mean) == (1, 4.2)
    assert summary.sd is None and summary.low is None and summary.high is None


def test_nothing_to_summarise_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        summarise([])


@SETTINGS
@given(LOSSES.filter(lambda values: len(set(values)) > 1))
def test_mean_spread_and_interval_are_scipys(values):
    summary = summarise(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.sd == pytest.approx(np.std(values, ddof=1))
    assert (summary.low, summary.high) == pytest.approx((low, high))


@SETTINGS
@given(LOSSES, st.data())
def test_the_paired_t_test_is_scipys(first, data):
    second = data.draw(st.lists(st.floats(1, 9), min_size=len(first), max_size=len(first)))
    differences = np.subtract(first, second)
    if np.std(differences) < 1e-6:
        return  # no spread: see the test below
    result = paired(dict(enumerate(first)), dict(enumerate(second)))
    assert result is not None
    theirs = stats.ttest_rel(first, second)
    interval = theirs.confidence_interval(0.95)
    assert result.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


def test_only_common_seeds_are_compared():
    result = paired({1: 4.0, 2: 4.2, 7: 9.0}, {2: 4.1, 1: 4.3, 8: 0.0})
    assert result is not None
    assert result.seeds == (1, 2)
    assert result.differences == pytest.approx((-0.3, 0.1))
    assert paired({1: 4.0}, {2: 4.0}) is None


def test_one_pair_has_no_interval_and_no_test():
    result = paired({3: 4.0}, {3: 4.5})
    assert result is not None
    assert result.mean == -0.5
    assert (result.sd, result.low, result.high, result.p, result.p_sign_flip) == (None,) * 5


def test_differences_without_spread():
    same = paired({1: 4.0, 2: 4.5}, {1: 4.0, 2: 4.5})
    assert same is not None and same.p == same.p_sign_flip == 1.0
    shifted = paired({1: 4.0, 2: 4.5}, {1: 3.0, 2: 3.5})
    assert shifted is not None and shifted.p is None, "an infinite t is no evidence of two seeds"


def test_the_sign_flip_test_of_known_cases():
    assert sign_flip([1.0, 1.0, 1.0]) == 2 / 8, "all signs alike: the smallest p of three pairs"
    assert sign_flip([-1.0, -2.0, -3.0, -4.0, -5.0]) == 2 / 32
    # |3 + 1 - 1| is reached or passed by 3+1+1, 3+1-1, 3-1+1 and their mirror images.
    assert sign_flip([3.0, 1.0, -1.0]) == 6 / 8
    assert sign_flip([0.5]) is None
    assert sign_flip([0.1] * 17) is None


@SETTINGS
@given(st.lists(st.integers(-50, 50).map(lambda n: n / 7), min_size=2, max_size=8))
def test_the_sign_flip_test_is_scipys_permutation_test(differences):
    theirs = stats.permutation_test(
        (np.array(differences), np.zeros(len(differences))),
        lambda x, y, axis: np.abs(np.mean(x - y, axis=axis)),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=np.inf,
    )
    assert sign_flip(differences) == pytest.approx(theirs.pvalue)


def test_holm_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, None, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([]) == []


@SETTINGS
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    adjusted = holm(values)
    order = np.argsort(values, kind="stable")
    rejected = set()
    for rank, place in enumerate(order):
        if values[place] * (len(values) - rank) >= 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(adjusted) if p is not None and p < 0.05} == rejected
    assert all(p is not None and p >= value for p, value in zip(adjusted, values))


def test_perplexity_of_a_diverged_run_is_infinite():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
