"""What a selection asks of the scores a rank holds: passes over all of them, or over what was kept.

On a CPU in C++ (passes.cpp), where it could be built. What follows in numpy and torch is the
specification of that, what runs without a compiler, and what runs on GPUs: the same bits.
"""

import ctypes
import functools
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_gpt.native import library
from sparse_gpt.topology.bits import Bits, chunk_size, chunks, indices, pack, positions_in
from sparse_gpt.topology.keys import Source

TOP = 0x7FFFFFFF  # the largest key
_CAPACITY = 1 << 14  # of what a pass keeps, at least


@dataclass(frozen=True)
class Bracket:
    """Keys `low .. high`, or, where `ties`, that one key at canonical positions `first .. last`.

    `width`: keys or positions a bin.
    """

    low: int
    high: int
    first: int
    last: int
    ties: bool
    width: int


class Part:
    """One source, and what is held of it between passes.

    A row of statistics, int32 or int64 `[2 + bins]`, counts on this rank: whether scores are not
    finite, candidates above a bracket, and candidates inside it by bin, ascending.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.above: Bits | None = None  # candidates above the bracket of the pass that kept
        self.found: Tensor | None = None  # local positions inside it, ascending
        self.keys: Tensor | None = None

    def sample(self, stride: int, slots: Tensor) -> None:
        """At every stride-th position of the layer that is a candidate here: its key + 1.

        `slots`: int32, one for each such position of the whole layer; 0 stays for what is none.
        """
        source = self.source
        if native := _native(source):
            native.sample(source, stride, slots)
            return
        first, last = -(-source.start // stride), -(-(source.start + source.numel) // stride)
        slot = torch.arange(first, last, device=source.device)
        at = slot * stride - source.start
        if at.numel():
            at, slot = at[mine := source.candidates.at(at).bool()], slot[mine]
            slots[slot] = source.keys_at(at).clamp_(max=TOP - 1).add_(1)

    def count_all(self, at: Bracket, row: Tensor, keep: bool, check: bool) -> None:
        """A pass over everything; keeps what is inside the bracket if asked to."""
        if self.source.numel == 0:
            return
        if native := _native(self.source):
            self.above, found = native.scan(self.source, at, row, keep, check)
            if found is not None:
                self.found, self.keys = found
        else:
            self._count_all(at, row, keep, check)

    def _count_all(self, at: Bracket, row: Tensor, keep: bool, check: bool) -> None:
        source, above, places, found, finite = self.source, [], [], [], []
        size = min(source.numel, chunk_size(source.device))
        buffer = torch.empty(size, dtype=torch.int32, device=source.device)
        for start, stop in chunks(source.numel, source.device):
            keys = source.keys(start, stop, buffer)
            is_finite = source.is_finite(keys) if check else None
            if is_finite is not None:
                finite.append(is_finite)
            candidates = source.candidates.data[start // 8 : -(-stop // 8)]
            higher, place, inside = _scan(keys, candidates, at.low, at.high)
            above.append(higher)
            place += start
            if keep:
                places.append(place.to(torch.int32) if source.numel < 1 << 31 else place)
                found.append(inside)
            else:  # nothing grows with what lies inside
                _add_bins(at, source, place, inside, row[2:])
        if finite:
            row[0] += (~torch.stack(finite)).any()
        self.above = Bits(torch.cat(above), source.numel) & source.candidates
        row[1] += self.above.count()
        if keep:
            self.found, self.keys = torch.cat(places), torch.cat(found)
            _add_bins(at, source, self.found, self.keys, row[2:])

    def count_kept(self, at: Bracket, row: Tensor) -> None:
        """The same from what an earlier pass kept."""
        if self.found is None or self.keys is None:
            return
        if native := _native(self.source):
            native.count(self.source, at, self.found, self.keys, row)
            return
        now = indices((self.keys >= at.low) & (self.keys <= at.high))
        _add_bins(at, self.source, self.found[now], self.keys[now], row[2:])

    def chosen(self, at: Bracket, kept: bool) -> Bits:
        """All that is above or inside a bracket: keys above `low`, and equal ones up to `last`."""
        source, low = self.source, at.low
        if source.numel == 0:
            return Bits.empty(0, source.device)
        last = at.last - source.base - source.start
        if kept and self.above is not None:
            if self.found is not None and self.keys is not None:
                if native := _native(source):
                    native.take(self.found, self.keys, low, last, self.above)
                else:
                    taken = indices(_taken(self.found, self.keys, low, last, source.numel))
                    self.above.add_(self.found[taken].to(torch.int64))
            return self.above
        packed = []
        for start, stop in chunks(source.numel, source.device):
            found = torch.arange(start, stop, device=source.device)
            packed.append(pack(_taken(found, source.keys(start, stop), low, last, source.numel)))
        return Bits(torch.cat(packed), source.numel) & source.candidates


def _taken(found: Tensor, keys: Tensor, low: int, last: int, numel: int) -> Tensor:
    if last >= numel - 1:
        return keys >= low
    if last < 0:  # perhaps less than what the positions' type holds
        return keys > low
    return (keys > low) | ((keys == low) & (found <= last))


def _scan(keys: Tensor, candidates: Tensor, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk of keys: packed bits of `keys > high`, candidates or not; and of the candidates with
    `low <= key <= high` the positions (int64) and the keys.

    In numpy on a CPU, whose comparisons and searches are vectorised there.
    """
    if keys.device.type != "cpu":
        above = pack(keys > high)
        inside = pack(keys >= low) & ~above & candidates
        place = Bits(inside, keys.numel()).positions()
        return above, place, keys[place]
    array = keys.numpy()
    over = np.packbits(array > high)
    within = np.packbits(array >= low)
    within &= ~over
    within &= candidates.numpy()
    place = positions_in(within)
    return torch.from_numpy(over), torch.from_numpy(place), torch.from_numpy(array.take(place))


def _add_bins(at: Bracket, source: Source, found: Tensor, keys: Tensor, bins: Tensor) -> None:
    if at.ties:
        place = found.to(torch.int64) + (source.base + source.start)
        place = place[(place >= at.first) & (place <= at.last)] - at.first
    else:
        place = keys - at.low
    if place.numel():
        index = torch.div(place, at.width, rounding_mode="floor")
        bins += torch.bincount(index, minlength=bins.numel()).to(bins.dtype)


class _Source(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32), ("seed_low", c_uint32), ("seed_high", c_uint32), ("values", c_void_p),
        ("candidates", c_void_p), ("start", c_int64), ("numel", c_int64),
    )  # fmt: skip


class _Bracket(ctypes.Structure):
    _fields_ = (
        ("low", c_int32), ("high", c_int32), ("ties", c_int32), ("first", c_int64),
        ("last", c_int64), ("width", c_int64), ("base", c_int64),
    )  # fmt: skip


class Native:
    """passes.cpp, with tensors for pointers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        p, i, n = c_void_p, c_int32, c_int64
        self._scan, self._count, self._take = library.scan, library.count, library.take
        self._sample, self._keep_only = library.sample, library.keep_only
        self._scan.argtypes, self._scan.restype = (p, p, i, p, p, p, n, i, p), n
        self._count.argtypes, self._count.restype = (p, p, p, n, i, p), None
        self._take.argtypes, self._take.restype = (p, p, n, i, n, p), None
        self._sample.argtypes, self._sample.restype = (p, n, p), None
        self._keep_only.argtypes, self._keep_only.restype = (p, n, p, i), None

    def scan(
        self, source: Source, at: Bracket, row: Tensor, keep: bool, check: bool
    ) -> tuple[Bits, tuple[Tensor, Tensor] | None]:
        above = Bits.empty(source.numel)
        capacity = min(source.numel, max(_CAPACITY, source.numel // 16)) if keep else 0
        counts = row
        while True:
            found = torch.empty(2, capacity, dtype=torch.int32)
            inside = self._scan(
                _of(source), _at(at, source), check, above.data.data_ptr(), found.data_ptr(),
                found.data_ptr() + 4 * capacity, capacity, row.element_size(), counts.data_ptr(),
            )  # fmt: skip
            if not keep:
                return above, None
            if inside <= capacity:
                found = found[:, :inside].clone()  # what was not needed is given back
                return above, (found[0], found[1])
            # More than expected: looked for again, and not counted again.
            capacity, counts = inside, torch.zeros_like(row)

    def count(self, source: Source, at: Bracket, found: Tensor, keys: Tensor, row: Tensor) -> None:
        self._count(
            _at(at, source), found.data_ptr(), keys.data_ptr(), keys.numel(), row.element_size(),
            row.data_ptr(),
        )  # fmt: skip

    def take(self, found: Tensor, keys: Tensor, low: int, last: int, into: Bits) -> None:
        """Put what is found and chosen into a set."""
        self._take(found.data_ptr(), keys.data_ptr(), keys.numel(), low, last, into.data.data_ptr())

    def sample(self, source: Source, stride: int, slots: Tensor) -> None:
        self._sample(_of(source), stride, slots.data_ptr())

    def keep_only(self, bits: Tensor, values: Tensor) -> None:
        """Zero the elements of a 1-D tensor that are not in a set, uint8 `[ceil(n / 8)]`."""
        self._keep_only(bits.data_ptr(), values.numel(), values.data_ptr(), values.element_size())


def _of(source: Source) -> "ctypes._Pointer[_Source]":
    kind, values, low, high = source.native or (0, None, 0, 0)
    return ctypes.pointer(
        _Source(
            kind, low, high, None if values is None else values.data_ptr(),
            source.candidates.data.data_ptr(), source.start, source.numel,
        )
    )  # fmt: skip


def _at(at: Bracket, source: Source) -> "ctypes._Pointer[_Bracket]":
    base = source.base + source.start
    return ctypes.pointer(_Bracket(at.low, at.high, at.ties, at.first, at.last, at.width, base))


@functools.cache
def native_passes() -> Native | None:
    """The passes in C++, or None where they cannot be built."""
    built = library(Path(__file__).with_name("passes.cpp"))
    return None if built is None else Native(built)


def _native(source: Source) -> Native | None:
    """Where a source's passes can run in C++: on a CPU, over keys it knows, in int32 positions."""
    if source.device.type != "cpu" or source.native is None or source.numel >= 1 << 31:
        return None
    return native_passes()
