"""App. A.2's binary search: the active weights, or the width, at which a run costs a budget.

Costs are FLOPs of a whole run, exact integers, and grow with the number searched for.
"""

from collections.abc import Callable


def nearest(cost: Callable[[int], int], budget: int, low: int, high: int) -> int:
    """The integer in [low, high] whose cost is nearest to `budget`; ties take the smaller.

    `cost` must not fall. Takes about log2(high - low) calls.
    """
    first, last = low, high
    while low < high:  # the last one within the budget
        middle = (low + high + 1) // 2
        if cost(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    around = range(max(first, low), min(last, low + 1) + 1)
    return min(around, key=lambda n: (abs(cost(n) - budget), n))


def upper_bound(cost: Callable[[int], int], budget: int, start: int) -> int:
    """A number from `start` up whose cost is above `budget`, at most twice the first such one."""
    while cost(start) <= budget:
        start *= 2
    return start
