"""Held-out documents: the share asked for, never none, never all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.holdout import HoldoutRule, resolve_holdout
from sparse_gpt.errors import UserError


def _splits(rule: HoldoutRule, n: int) -> list[str]:
    holdout = resolve_holdout(rule, n)
    return [holdout.split_of(i) for i in range(n)]


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(40, 400), val=st.floats(0, 0.5), test=st.floats(0, 0.3), seed=st.integers(0, 99)
)
def test_every_split_asked_for_has_a_document(n, val, test, seed):
    splits = _splits(HoldoutRule(seed, val, test_fraction=test), n)
    assert (splits.count("val") > 0) == (val > 0)
    assert (splits.count("test") > 0) == (test > 0)
    assert splits.count("train") > 0


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), wanted=st.integers(1, 40), seed=st.integers(0, 99))
def test_exact_number(n, wanted, seed):
    rule = HoldoutRule(seed, val_documents=wanted)
    if n <= wanted:
        with pytest.raises(UserError, match=f"the corpus has {n} document"):
            _splits(rule, n)
    else:
        assert _splits(rule, n).count("val") == wanted


def test_shares_and_seeds():
    splits = _splits(HoldoutRule(1, 0.1, test_fraction=0.2), 20_000)
    assert abs(splits.count("val") / 20_000 - 0.1) < 0.01
    assert abs(splits.count("test") / 20_000 - 0.2) < 0.01
    assert splits != _splits(HoldoutRule(2, 0.1, test_fraction=0.2), 20_000)
    # A document keeps its split when others are appended.
    assert splits[:10_000] == _splits(HoldoutRule(1, 0.1, test_fraction=0.2), 10_000)


def test_one_document():
    with pytest.raises(UserError, match="set --val-fraction 0 to hold out nothing"):
        resolve_holdout(HoldoutRule(), 1)
    assert _splits(HoldoutRule(val_fraction=0), 1) == ["train"]
    assert sorted(_splits(HoldoutRule(), 2)) == ["train", "val"]
    assert sorted(_splits(HoldoutRule(test_fraction=0.01), 3)) == ["test", "train", "val"]


def test_all_held_out():
    rules = [HoldoutRule(seed, 0.5, test_fraction=0.49) for seed in range(50)]
    with pytest.raises(UserError, match="hold out all 4 documents; lower them"):
        [resolve_holdout(rule, 4) for rule in rules]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"val_fraction": -0.1}, "--val-fraction"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"test_fraction": float("nan")}, "--test-fraction"),
        ({"val_documents": 0}, "--val-documents"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave nothing"),
    ],
)
def test_bad_rules(options, flag):
    with pytest.raises(UserError, match=flag):
        HoldoutRule(**options)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), val=st.integers(1, 20), test=st.integers(1, 20), seed=st.integers(0, 99)
)
def test_exact_numbers_for_both_splits(n, val, test, seed):
    rule = HoldoutRule(seed, val_documents=val, test_documents=test)
    if n <= val + test:
        with pytest.raises(UserError, match=f"needs at least {val + test + 1}"):
            _splits(rule, n)
        return
    splits = _splits(rule, n)
    assert (splits.count("val"), splits.count("test")) == (val, test)
    # Validation is what it is without a test split.
    alone = _splits(HoldoutRule(seed, val_documents=val), n)
    assert [i for i in range(n) if splits[i] == "val"] == [i for i in range(n) if alone[i] == "val"]
