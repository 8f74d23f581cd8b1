"""Paired tests against their definitions, and the table made of them."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval import leaderboard_report, report, significance
from eval.significance import Differences, compare, sign_flips
from tests.eval.test_report import cells, leaderboard_result


def column(values: Any, documents: str = "abc", metric: str = "acc") -> dict[str, Any]:
    mean = float(np.mean([float(value) for value in values]))
    outcomes = {"metric": metric, "documents_sha256": documents, "values": values}
    return {"score": mean, "stderr": 0.02, "truncated_share": 0.0, "outcomes": outcomes}


def differences(one: Any, other: Any) -> Differences:
    found = significance.differences(column(one), column(other))
    assert found is not None
    return found


def test_mcnemar_on_the_discordant_documents() -> None:
    """8 documents only the first answers, 1 only the second: 2 (1 + 9) / 2^9."""
    one = "1" * 8 + "0" + "1" * 30 + "0" * 20
    other = "0" * 8 + "1" + "1" * 30 + "0" * 20
    comparison = compare(differences(one, other))
    assert comparison.test == "McNemar" and comparison.documents == 59
    assert comparison.p == pytest.approx(20 / 512)
    assert comparison.difference == pytest.approx(7 / 59)
    gaps = np.array([1] * 8 + [-1] + [0] * 50)
    assert comparison.stderr == pytest.approx(stats.sem(gaps))
    assert compare(differences("0101", "0101")).p == 1.0


def test_sign_flips_against_all_patterns() -> None:
    terms = np.random.default_rng(3).normal(0.6, 1.0, 10)
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = np.mean(np.abs(signs @ terms) >= abs(terms.sum()) - 1e-12)
    assert 0.02 < exact < 0.9
    assert sign_flips(terms) == pytest.approx(exact, abs=0.02)
    assert sign_flips(terms) == sign_flips(np.append(terms, 0.0))
    assert sign_flips(np.ones(40)) == 1 / (significance.FLIPS + 1)
    assert sign_flips(np.zeros(3)) == 1.0
    # Binary terms of one weight: the same hypothesis as McNemar's test.
    gaps = np.array([1.0] * 14 + [-1.0] * 6)
    assert sign_flips(gaps) == pytest.approx(stats.binomtest(14, 20).pvalue, abs=0.02)


def test_sign_flips_hold_their_level() -> None:
    """Under the null hypothesis p is below 0.1 about one time in ten."""
    draw = np.random.default_rng(0)
    low = [sign_flips(draw.normal(size=60) * draw.uniform(size=60)) < 0.1 for _ in range(100)]
    assert 0.03 < np.mean(low) < 0.19


def test_subjects_weigh_the_same() -> None:
    """The column is the mean over subjects, whatever their sizes."""
    subjects = {"a": ("1111", "0000"), "b": ("00000000", "00000001")}
    one, other = (
        {"subjects": {name: column(pair[place]) for name, pair in subjects.items()}}
        for place in (0, 1)
    )
    found = significance.differences(one, other)
    assert found is not None
    comparison = compare(found)
    assert comparison.difference == pytest.approx((1.0 - 1 / 8) / 2)
    assert comparison.test == "sign flips"
    errors = [stats.sem([1, 1, 1, 1]), stats.sem([0] * 7 + [-1])]
    assert comparison.stderr == pytest.approx(np.hypot(*errors) / 2)
    both = significance.average([found, differences("10", "00")])
    assert both.difference == pytest.approx((comparison.difference + 0.5) / 2)


def test_other_documents_are_not_paired() -> None:
    assert significance.differences(column("01"), column("11", documents="other")) is None
    assert significance.differences(column("01"), column("11", metric="acc_norm")) is None
    assert significance.differences(column("01"), {"score": 0.5}) is None
    assert compare(differences([0.5], [0.25])).stderr is None


def test_the_table_says_what_is_significant() -> None:
    """Holm: p of 0.02 among five tasks is not; p of 0.0000 is."""
    flat = dict.fromkeys(leaderboard_report.COLUMNS, 0.5)
    dense, sparse = leaderboard_result("dense", flat), leaderboard_result("sparse", flat)
    for key in flat:
        dense["tasks"][key] = column("01" * 50)
        sparse["tasks"][key] = column("01" * 50)
    sparse["tasks"]["arc"] = column("1" * 100)
    sparse["tasks"]["winogrande"] = column("1" * 14 + "01" * 43)
    sparse["tasks"]["truthfulqa"] = column([0.5] * 100)
    text = report.tables([dense, sparse]).split("Difference to dense")[1].split("Requests")[0]
    row, p = cells(text, "sparse"), cells(text, "  p")
    assert row[1] == "+50.0 ± 5.0 *"
    assert row[5] == "+7.0 ± 2.6"
    assert p[1] == "0.0000" and p[5] == "0.06", "7 of 7 by 2 / 2^7, times four"
    assert row[2] == "+0.0 ± 0.0" and p[2] == "1.00"
    assert "Without p" not in text
