"""Sets of positions as packed bits: an eighth of a byte a position.

The most significant bit of a byte comes first (as in `numpy.packbits`); the bits behind the last
position are zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Every byte unpacked into eight, read as one int64.
_UNPACKED = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1))
_TABLES = {torch.device("cpu"): _UNPACKED.view(torch.int64).view(-1)}
# Gathers the eight 0/1 bytes of an int64 into its highest byte.
_GATHER = 0x8040201008040201 - (1 << 64)


def pack(flags: Tensor) -> Tensor:
    """bool or 0/1 uint8 `[n]` -> uint8 `[ceil(n / 8)]`."""
    flags = flags.view(torch.uint8)
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.numpy()))
    if flags.numel() % 8 or flags.storage_offset() % 8:  # else it can be read as int64
        flags = torch.nn.functional.pad(flags, (0, -flags.numel() % 8)).clone()
    return ((flags.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack(data: Tensor) -> Tensor:
    """uint8 `[n]` -> 0/1 uint8 `[8 n]`."""
    if data.device not in _TABLES:
        _TABLES[data.device] = _TABLES[torch.device("cpu")].to(data.device)
    return _TABLES[data.device].index_select(0, data.int()).view(torch.uint8)


def positions_in(packed: np.ndarray) -> np.ndarray:
    """Positions of the bits that are set, int64, ascending; cheap where they are few."""
    place = (packed != 0).nonzero()[0]  # searching bools is vectorised
    inside = np.unpackbits(packed.take(place)).view(np.bool_).nonzero()[0]
    return (place.take(inside >> 3) << 3) + (inside & 7)


def indices(flags: Tensor) -> Tensor:
    """bool `[n]` -> positions where it is True, int64, ascending."""
    if flags.device.type == "cpu":
        return torch.from_numpy(flags.numpy().nonzero()[0])
    return flags.nonzero().view(-1)


def chunk_size(device: torch.device) -> int:
    """Positions looked at at once: on a CPU what fits its cache, elsewhere what keeps it busy."""
    return 1 << 17 if device.type == "cpu" else 1 << 23


def chunks(numel: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """`[start, stop)` ranges that cover `numel` positions; starts are multiples of 8."""
    size = chunk_size(device)
    for start in range(0, numel, size):
        yield start, min(numel, start + size)


@dataclass(frozen=True)
class Bits:
    """A set among `numel` positions; `data` is uint8 `[ceil(numel / 8)]`."""

    data: Tensor
    numel: int

    @staticmethod
    def empty(numel: int, device: torch.device | str = "cpu") -> "Bits":
        """No position."""
        return Bits(torch.zeros(-(-numel // 8), dtype=torch.uint8, device=device), numel)

    @staticmethod
    def of(flags: Tensor) -> "Bits":
        """The positions where a bool tensor of any shape is True, in row-major order."""
        flat = flags.reshape(-1)
        return Bits(pack(flat), flat.numel())

    def flags(self, start: int = 0, stop: int | None = None) -> Tensor:
        """0/1 uint8 of positions `[start, stop)`; `start` must be a multiple of 8."""
        stop = self.numel if stop is None else stop
        if start % 8:
            raise ValueError(f"bits are read from multiples of 8, not from {start}")
        return unpack(self.data[start // 8 : -(-stop // 8)])[: stop - start]

    def positions(self) -> Tensor:
        """The positions in the set, int64, ascending; cheap where they are few."""
        if self.data.device.type == "cpu":
            return torch.from_numpy(positions_in(self.data.numpy()))
        place = self.data.nonzero().view(-1)
        inside = unpack(self.data[place]).view(-1, 8).nonzero()
        return place[inside[:, 0]] * 8 + inside[:, 1]

    def at(self, positions: Tensor) -> Tensor:
        """0/1 uint8 of some positions, int64 `[n]` -> `[n]`."""
        return (self.data[positions >> 3] >> (7 - (positions & 7)).to(torch.uint8)) & 1

    def count(self) -> Tensor:
        """How many positions are in the set, 0-d int64 on the device."""
        if self.data.device.type == "cpu":
            return torch.tensor(int(np.bitwise_count(self.data.numpy()).sum(dtype=np.int64)))
        pairs = self.data - ((self.data >> 1) & 0x55)
        fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        return ((fours + (fours >> 4)) & 0x0F).sum(dtype=torch.int64)

    def add_(self, positions: Tensor) -> None:
        """Put distinct positions that are not in the set into it, in place."""
        values = (128 >> (positions & 7)).to(torch.uint8)
        self.data.index_add_(0, positions >> 3, values)

    def to(self, device: torch.device | str) -> "Bits":
        return Bits(self.data.to(device), self.numel)

    def __or__(self, other: "Bits") -> "Bits":
        return Bits(self.data | other.data, self.numel)

    def __and__(self, other: "Bits") -> "Bits":
        return Bits(self.data & other.data, self.numel)

    def __sub__(self, other: "Bits") -> "Bits":
        return Bits(self.data & ~other.data, self.numel)

    def __invert__(self) -> "Bits":
        data = ~self.data
        if self.numel % 8:
            data[-1] &= 0xFF << (8 - self.numel % 8) & 0xFF
        return Bits(data, self.numel)
