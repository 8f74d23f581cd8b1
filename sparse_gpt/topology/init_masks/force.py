"""FORCE (de Jorge et al. 2021): progressive skeletonisation.

SNIP's sensitivity falls apart when most weights go at once. FORCE takes them away in rounds: the
gradient is of the loss with the last round's mask in the forward pass, but by every weight, so
that a weight that went can come back:

    c_t = top-k_t of |theta * dL/dtheta at (theta * c_{t-1})|,  c_0 = 1
"""

import math


def round_counts(total: int, target: int, rounds: int) -> list[int]:
    """Units kept after each of T rounds, from `total` at the start to exactly `target`.

    The paper's exponential schedule: log k_t = (t/T) log target + (1 - t/T) log total, to the
    nearest unit.
    """
    low, high = math.log(target), math.log(total)
    counts = [round(math.exp((t * low + (rounds - t) * high) / rounds)) for t in range(1, rounds)]
    return [*counts, target]
