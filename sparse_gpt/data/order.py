"""The order of samples: a pure function of (seed, samples consumed).

Nothing here holds state that a checkpoint would have to save, knows a rank or a world size, or
uses floating point after construction, so a resumed run, another number of ranks and another
machine all see the same sequence.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from sparse_gpt.errors import UserError

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6
_MAX_BLOCK = 1_000_000


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and strings; the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(x: int) -> int:
    """A bijective 64-bit hash (the SplitMix64 finaliser)."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix64_array(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: int) -> list[int]:
    return [mix64((key & _MASK64) ^ (r * _GOLDEN & _MASK64)) for r in range(_ROUNDS)]


def _half_bits(n: int) -> int:
    return max(1, ((n - 1).bit_length() + 1) // 2)


def permute(index: int, n: int, key: int) -> int:
    """Position `index` of a pseudo-random permutation of range(n), in O(1) time and memory.

    A balanced Feistel network permutes the smallest domain of 4^h >= n integers; walking its
    cycle until the value falls below n restricts it to range(n) (fewer than 4 steps expected).
    """
    if not 0 <= index < n:
        raise IndexError(f"index {index} is outside range({n})")
    if n == 1:
        return 0
    half = _half_bits(n)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    x = index
    while True:
        left, right = x >> half, x & mask
        for k in keys:
            left, right = right, left ^ (mix64(right ^ k) & mask)
        x = left << half | right
        if x < n:
            return x


def permute_array(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """`permute` of every element of an integer array; returns int64 of the same shape."""
    index = np.asarray(index)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise IndexError(f"an index is outside range({n})")
    x = index.astype(np.uint64).reshape(-1)
    if n > 1:
        half = np.uint64(_half_bits(n))
        mask = (np.uint64(1) << half) - np.uint64(1)
        keys = [np.uint64(k) for k in _round_keys(key)]
        todo = np.arange(x.size)
        while todo.size:
            value = x[todo]
            left, right = value >> half, value & mask
            for k in keys:
                left, right = right, left ^ (_mix64_array(right ^ k) & mask)
            x[todo] = value = left << half | right
            todo = todo[value >= n]
    return x.astype(np.int64).reshape(index.shape)


def block_counts(weights: Sequence[float]) -> list[int]:
    """How often each source occurs in one block of the mixture's pattern.

    The block is the shortest of 1,000, 10,000, ... 1,000,000 samples in which every source gets
    at least one; shares are rounded by largest remainder (ties: the earlier source).
    """
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    block = 1000
    while min(exact) * block < total:
        block *= 10
        if block > _MAX_BLOCK:
            raise UserError(
                f"data: weight {min(weights)} of source {weights.index(min(weights))} is less than "
                f"one sample in {_MAX_BLOCK:,}; raise it or remove the source"
            )
    quotas = [weight * block / total for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda s: (counts[s] - quotas[s], s))
    for source in by_remainder[: block - sum(counts)]:
        counts[source] += 1
    return counts


class SampleOrder:
    """Which item of which source is the i-th sample of a run.

    sizes: items in each source. weights: relative shares of SAMPLES (not of tokens or of epochs).
    Epoch e of a source is a fresh permutation of its items, so every item is used once an epoch.
    With several sources the stream is cut into blocks of fixed length; each holds exactly
    `block_counts(weights)` samples of each source, in an order shuffled block by block.
    """

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]):
        if not sizes:
            raise UserError("data: at least one source is needed")
        if len(sizes) != len(weights):
            raise UserError(f"data: {len(sizes)} sources but {len(weights)} weights")
        for source, (size, weight) in enumerate(zip(sizes, weights)):
            if size < 1:
                raise UserError(f"data: source {source} has no items")
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data: weight of source {source} is {weight}; weights must be positive and "
                    "finite"
                )
        self.seed = int(seed)
        self.sizes = [int(size) for size in sizes]
        self.counts = block_counts(list(weights)) if len(sizes) > 1 else [1]
        self.block = sum(self.counts)
        self._pattern = np.repeat(np.arange(len(sizes)), self.counts)
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def _sources_of_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of that source came earlier in the block) for each place in it."""
        cached = self._cached
        if cached is not None and cached[0] == block:
            return cached[1], cached[2]
        key = derive_key("mixture", self.seed, block)
        sources = self._pattern[permute_array(np.arange(self.block), self.block, key)]
        earlier = np.empty(self.block, dtype=np.int64)
        for source, count in enumerate(self.counts):
            earlier[sources == source] = np.arange(count)
        # One assignment, so that a reader in another thread sees a whole entry or none.
        self._cached = (block, sources, earlier)
        return sources, earlier

    def locate(self, sample_index: int) -> tuple[int, int]:
        """(source, item) of sample `sample_index` >= 0 of the run."""
        if sample_index < 0:
            raise IndexError(f"sample index {sample_index} is negative")
        source, walked = 0, sample_index
        if len(self.sizes) > 1:
            block, place = divmod(sample_index, self.block)
            sources, earlier = self._sources_of_block(block)
            source = int(sources[place])
            walked = block * self.counts[source] + int(earlier[place])
        size = self.sizes[source]
        epoch, position = divmod(walked, size)
        return source, permute(position, size, derive_key("epoch", self.seed, source, epoch))

    def consumed(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source."""
        if samples < 0:
            raise IndexError(f"{samples} samples is negative")
        if len(self.sizes) == 1:
            return [samples]
        block, place = divmod(samples, self.block)
        partial = np.bincount(
            self._sources_of_block(block)[0][:place], minlength=len(self.sizes)
        ).tolist()
        return [block * count + more for count, more in zip(self.counts, partial)]
