"""How many tokens to compute at a time: found by a short measurement on the device at hand."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

LARGEST = 1 << 19  # tokens
ENOUGH_GAIN = 1.03  # of speed, or a larger batch is not worth its memory
LONGEST_PROBE = 4.0  # seconds of one batch; larger ones are not tried


@dataclass(frozen=True)
class Measured:
    """tokens: the best number at a time; speed: tokens a second with it; tried: speeds by
    tokens at a time."""

    tokens: int
    speed: float
    tried: dict[int, float]


def measure(
    compute: Callable[[int], None], length: int, sizes: Iterable[int] | None = None
) -> Measured:
    """Try batches of 1, 2, 4, ... sequences of `length` tokens and keep the fastest.

    compute: runs a batch of so many sequences to its end. sizes: the only numbers of sequences to
    try, where the user has chosen; memory that does not suffice is then an error. Stops where
    memory ends, where two sizes in a row bring no more speed, or where one batch takes seconds.
    Each size is run twice, the first time to warm up; the better time counts.
    """
    tried: dict[int, float] = {}
    for count in sizes or _doubling(length):
        try:
            seconds = min(_seconds(compute, count) for _ in range(2))
        except torch.OutOfMemoryError:
            if not tried:
                raise
            torch.cuda.empty_cache()
            break
        tried[count * length] = count * length / seconds
        speeds = list(tried.values())
        if seconds > LONGEST_PROBE or (
            len(speeds) > 2 and max(speeds[-2:]) < ENOUGH_GAIN * max(speeds[:-2])
        ):
            break
    # The smallest of those that are about as fast as the fastest.
    best = min(size for size, speed in tried.items() if speed * ENOUGH_GAIN >= max(tried.values()))
    return Measured(best, tried[best], tried)


def _doubling(length: int) -> Iterator[int]:
    count = 1
    while count == 1 or count * length <= LARGEST:
        yield count
        count *= 2


def _seconds(compute: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    compute(count)
    return time.perf_counter() - start
