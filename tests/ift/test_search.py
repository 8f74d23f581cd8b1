"""The binary search against trying every number."""

from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.ift.search import nearest, upper_bound


@given(
    steps=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    budget=st.integers(-3, 120),
    start=st.integers(0, 9),
)
def test_nearest_is_the_best_of_all(steps, budget, start):
    costs = [sum(steps[: i + 1]) for i in range(len(steps))]
    found = nearest(lambda n: costs[n - start], budget, start, start + len(costs) - 1)
    assert abs(costs[found - start] - budget) == min(abs(cost - budget) for cost in costs)


def test_a_tie_takes_the_smaller():
    assert nearest(lambda n: 10 * n, 25, 0, 9) == 2


def test_it_takes_few_calls():
    calls = []
    assert nearest(lambda n: calls.append(n) or 3 * n, 3 * 10**8 + 1, 0, 10**9) == 10**8
    assert len(calls) < 40


@given(start=st.integers(1, 50), budget=st.integers(0, 10_000))
def test_the_upper_bound_is_above_and_not_far(start, budget):
    bound = upper_bound(lambda n: 7 * n, budget, start)
    assert 7 * bound > budget
    assert bound == start or 7 * (bound // 2) <= budget
