"""Rows hold every sequence once, share only what is common, and never compute more."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.sharing import Row, batches, common_prefix, plan_rows


def arrays(*sequences: list[int]) -> list[np.ndarray]:
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


# Few different tokens, and heads to begin with, so that beginnings are often shared.
heads = st.sampled_from([[], [1] * 9, [1] * 9 + [2] * 8, [3, 1] * 6])
tails = st.lists(st.integers(0, 2), min_size=1, max_size=12)
texts = st.lists(st.tuples(heads, tails).map(lambda p: p[0] + p[1]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 4), st.integers(8, 60))
def test_rows_are_valid_and_save(texts: list[list[int]], scored: int, limit: int) -> None:
    sequences = arrays(*{tuple(text): text for text in texts}.values())
    shareable = [max(0, len(sequence) - scored) for sequence in sequences]
    rows = plan_rows(sequences, shareable, limit)
    assert sorted(i for row in rows for i in row.members) == list(range(len(sequences)))
    for row in rows:
        assert (row.prefix == 0) == (len(row.members) == 1)
        first = sequences[row.members[0]]
        for member in row.members:
            assert row.prefix <= shareable[member]
            assert common_prefix(first, sequences[member]) >= row.prefix
        rests = sum(len(sequences[member]) - row.prefix for member in row.members)
        assert row.length == row.prefix + rests
        assert row.length <= limit or len(row.members) == 1
    assert sum(row.length for row in rows) <= sum(map(len, sequences))
    assert [row.length for row in rows] == sorted((row.length for row in rows), reverse=True)
    assert rows == plan_rows(sequences, shareable, limit)


def test_the_cheapest_level_of_a_tree_of_beginnings_is_shared() -> None:
    """Two questions of two answers each: one prompt for all pays, unless questions are long."""
    prompt = [7] * 20

    def tokens(question: int) -> int:
        texts = [prompt + [q] * question + [10 + a] * 2 for q in (1, 2) for a in (1, 2)]
        return sum(row.length for row in plan_rows(arrays(*texts), [20 + question] * 4, 200))

    assert tokens(3) == 20 + 4 * (3 + 2)
    assert tokens(30) == 2 * (20 + 30 + 2 * 2)


def test_a_long_group_is_cut_into_rows() -> None:
    texts = arrays(*([5] * 10 + [number] * 5 for number in range(9)))
    rows = plan_rows(texts, [10] * 9, 30)
    assert [(row.prefix, len(row.members), row.length) for row in rows] == [
        (10, 4, 30), (10, 4, 30), (0, 1, 15),
    ]  # fmt: skip


def test_little_in_common_is_not_worth_a_mask() -> None:
    texts = arrays([1, *[2] * 30], [1, *[3] * 30])
    assert [row.prefix for row in plan_rows(texts, [20, 20], 100)] == [0, 0]


def test_batches_keep_to_the_budget_and_apart() -> None:
    rows = [Row(4, (0, 1), 20), Row(0, (2,), 12), Row(0, (3,), 12), Row(0, (4,), 5)]
    made = batches(rows, 24)
    assert [[row.members for row in batch] for batch in made] == [[(2,), (3,)], [(4,)], [(0, 1)]]
    assert [len(batch) for batch in batches(rows, 1)] == [1, 1, 1, 1]
    assert batches([], 10) == []


@pytest.mark.parametrize("pair", [([1, 2, 3], [1, 2]), ([1, 2], [1, 2, 9])])
def test_common_prefix(pair: tuple[list[int], list[int]]) -> None:
    assert common_prefix(*arrays(*pair)) == 2
