"""Scores as ordered integers: what the selection over shards compares.

A key is an int32 in `[0, 2^31)`; the larger key is taken first. The bits of a finite fp32
magnitude, read as an integer, are ordered as the magnitudes are (denormals included), so keys
compare exactly as the scores do.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.random import RandomKey

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000


class NonFiniteScores(ValueError):
    """A score is infinite or NaN, on any rank; every rank raises it."""

    def __init__(self) -> None:
        super().__init__("scores are not finite: no topology update")


class Source(ABC):
    """This rank's part of a layer's candidates: positions `start .. start + numel - 1` of `total`.

    `base` is the canonical position of the layer's first unit among all those it is compared with.
    """

    uniform = False  # whether keys are uniform over [0, 2^31): then no sample is needed

    def __init__(self, candidates: Bits, start: int, total: int, base: int = 0) -> None:
        self.candidates, self.start, self.total, self.base = candidates, start, total, base

    @property
    def numel(self) -> int:
        return self.candidates.numel

    @property
    def device(self) -> torch.device:
        return self.candidates.data.device

    @abstractmethod
    def keys(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """int32 keys of local positions `[start, stop)`, candidates or not.

        `out`: memory for them, int32 of that many or more, which is used again and again.
        """

    @abstractmethod
    def keys_at(self, positions: Tensor) -> Tensor:
        """The same for some local positions, int64 `[n]`."""

    def is_finite(self, keys: Tensor) -> Tensor | None:
        """0-d bool: whether all scores behind some keys are finite; None where they must be."""
        return None

    @property
    def native(self) -> tuple[int, Tensor | None, int, int] | None:
        """For passes.cpp: its kind of keys, their fp32 values, two seeds. None: it knows none."""
        return None


class LargestMagnitude(Source):
    """Largest |value| first. `values`: fp32 or lower, 1-D, of this rank's part."""

    kind = 0

    def __init__(self, values: Tensor, candidates: Bits, start: int, total: int, base: int = 0):
        super().__init__(candidates, start, total, base)
        self.values = values

    @property
    def native(self) -> tuple[int, Tensor | None, int, int] | None:
        simple = self.values.dtype == torch.float32 and self.values.is_contiguous()
        return (self.kind, self.values, 0, 0) if simple else None

    def keys(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        bits = self.values[start:stop].float().view(torch.int32)
        return torch.bitwise_and(bits, _MAGNITUDE, out=None if out is None else out[: stop - start])

    def keys_at(self, positions: Tensor) -> Tensor:
        return self.values[positions].float().view(torch.int32) & _MAGNITUDE

    def is_finite(self, keys: Tensor) -> Tensor:
        return keys.max() < _INFINITY


class SmallestMagnitude(LargestMagnitude):
    """Smallest |value| first."""

    kind = 1

    def keys(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return super().keys(start, stop, out).bitwise_xor_(_MAGNITUDE)

    def keys_at(self, positions: Tensor) -> Tensor:
        return super().keys_at(positions).bitwise_xor_(_MAGNITUDE)

    def is_finite(self, keys: Tensor) -> Tensor:
        return keys.min() > _MAGNITUDE - _INFINITY


class Random(Source):
    """Random order, a function of the key and the position in the layer."""

    uniform = True

    def __init__(self, key: RandomKey, candidates: Bits, start: int, total: int, base: int = 0):
        super().__init__(candidates, start, total, base)
        self.key = key

    @property
    def native(self) -> tuple[int, Tensor | None, int, int]:
        return 2, None, self.key.low & 0xFFFFFFFF, self.key.high & 0xFFFFFFFF

    def keys(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        return self.key.range(self.start + start, self.start + stop, self.device)

    def keys_at(self, positions: Tensor) -> Tensor:
        return self.key.scores(positions + self.start)
