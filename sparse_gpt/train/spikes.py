"""Loss spikes: a loss far above those before it, by a rule that outliers do not move."""

from collections.abc import Sequence
from statistics import median

WINDOW = 64  # finite losses looked back on
LEAST = 16  # with fewer there are no spikes
DEVIATIONS = 8.0
# 1.4826 times the median absolute deviation estimates a normal distribution's standard deviation.
NORMAL = 1.4826
FLAT = 0.01  # of the median: what a deviation is at least, where losses hardly move


def spike_record(loss: float, recent: Sequence[float]) -> dict[str, float] | None:
    """`spike`: the loss, the median of those before it, the limit it exceeds; None if it does not.

    The limit is the median and `DEVIATIONS` standard deviations.
    """
    if len(recent) < LEAST:
        return None
    middle = median(recent)
    deviation = NORMAL * median(abs(one - middle) for one in recent)
    limit = middle + DEVIATIONS * max(deviation, FLAT * abs(middle))
    return {"loss": loss, "median": middle, "limit": limit} if loss > limit else None
