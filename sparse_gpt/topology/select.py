"""Exact global top-k over shards: every rank marks the chosen among the candidates it holds.

Radix select on ordered integer keys. A bracket around the k-th key is narrowed by histograms that
are summed over ranks: all groups (layers, or the whole model) in one exchange a round, a few
rounds in all. What is sent does not depend on the size of a layer or the number of ranks.

1. A sample of a fixed number of canonical positions a layer proposes the first bracket. It only
   saves work: the counts that follow are exact, and a bracket that misses is put right.
2. One pass marks what lies above the bracket and keeps the few positions inside it.
3. Histograms of those narrow the bracket to one key, and ties to one position: among equal keys
   the lower canonical position is taken first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits, chunk_size, chunks, indices, pack, positions_in
from sparse_gpt.topology.keys import Source

Reduce = Callable[[Tensor], Tensor]

TOP = 0x7FFFFFFF  # the largest key
BINS = 2048
SAMPLE = 1 << 13  # positions a layer, at most
SIGMAS = 4.0  # half width of the proposed bracket, in standard deviations of its rank
KEPT_SHARE = 1 / 8  # of the candidates: more are not kept between rounds but looked for again


@dataclass
class _Group:
    """One selection: the k largest of `candidates` keys. Brackets include both their ends."""

    k: int
    candidates: int
    positions: int  # canonical positions of all its layers
    low: int = 0
    high: int = 0
    first: int = 0
    last: int = 0
    taken: int = 0  # how many are above the bracket: larger keys, or equal ones further forward
    inside: int = 0
    ties: bool = False  # the bracket is one key: what is narrowed are positions first .. last
    kept: bool = False  # whether sources hold what is inside
    proposed_in: tuple[int, int] | None = None  # the bracket is a guess, in this certain one

    def __post_init__(self) -> None:
        self.high, self.last, self.inside = TOP, self.positions - 1, self.candidates

    @property
    def need(self) -> int:
        return self.k - self.taken

    @property
    def done(self) -> bool:
        return self.proposed_in is None and self.need in (0, self.inside)

    @property
    def keep(self) -> bool:
        return self.kept or self.inside <= max(SAMPLE, KEPT_SHARE * self.candidates)

    @property
    def width(self) -> int:
        """Keys or positions a bin."""
        low, high = (self.first, self.last) if self.ties else (self.low, self.high)
        return -(-(high - low + 1) // BINS)

    def propose(self, low: int, high: int, share: float) -> None:
        """A bracket that probably holds the cut, and about that share of the candidates."""
        self.proposed_in = (self.low, self.high)
        self.low, self.high, self.inside = low, high, int(share * self.candidates)

    def narrow(self, above: int, bins: np.ndarray, kept: bool) -> None:
        """From exact counts: keys above the bracket, and inside it by bin, ascending."""
        if self.proposed_in is not None:
            (low, high), inside = self.proposed_in, int(bins.sum())
            self.proposed_in = None
            if self.k <= above:  # the guess missed: the cut is above it
                self.low, self.high, self.inside = self.high + 1, high, above
                return
            if self.k > above + inside:
                self.low, self.high, self.taken = low, self.low - 1, above + inside
                self.inside = self.candidates - self.taken
                return
            self.taken = above
        self.kept, width = kept, self.width
        order = bins if self.ties else bins[::-1]
        counts = np.cumsum(order)
        i = int(np.searchsorted(counts, self.need))
        self.taken += int(counts[i] - order[i])
        self.inside = int(order[i])
        if self.ties:
            self.first += i * width
            self.last = min(self.last, self.first + width - 1)
        else:
            self.low += (BINS - 1 - i) * width
            self.high = min(self.high, self.low + width - 1)
            self.ties = self.low == self.high


@dataclass
class _Part:
    """What one source holds between rounds."""

    source: Source
    above: Bits | None = None  # keys above the bracket of the pass that kept
    found: Tensor | None = None  # local positions inside it, ascending
    keys: Tensor | None = None


def select_top(
    groups: Sequence[Sequence[Source]],
    counts: Sequence[int],
    candidates: Sequence[int],
    reduce: Reduce,
) -> list[list[Bits]]:
    """The `counts[g]` largest keys of each group, over all ranks. A collective.

    `groups[g]` are this rank's sources of the layers compared with each other, in the same order
    on every rank (empty where it holds nothing of a layer); `candidates[g]` how many candidates
    there are on all ranks. Returns what is chosen of every source. Every rank raises `ValueError`
    where a count is out of range, or a score that is looked at is not finite on any rank: none and
    all of the candidates are chosen without a look.
    """
    states = []
    for sources, k, many in zip(groups, counts, candidates, strict=True):
        if not 0 <= k <= many:
            raise ValueError(f"cannot choose {k} of {many} candidates")
        positions = max(source.base + source.total for source in sources)
        states.append((_Group(k, many, positions), [_Part(source) for source in sources]))
    live = [state for state in states if not state[0].done]
    _propose(live, reduce)
    first = True
    while live := [state for state in states if not state[0].done]:
        _round(live, reduce, check=first)
        first = False
    return [[_chosen(group, part) for part in parts] for group, parts in states]


def _propose(live: list[tuple[_Group, list[_Part]]], reduce: Reduce) -> None:
    """First brackets: from the distribution where it is known, else from a sample."""
    sampled = []
    for group, parts in live:
        if parts[0].source.uniform:
            share = 1 - group.k / group.candidates
            # The slack covers small groups, where the deviation is no guide.
            deviation = (SIGMAS * (group.k * share) ** 0.5 + 16) / group.candidates
            middle, half = share * TOP, deviation * TOP
            low, high = max(0, int(middle - half)), min(TOP, int(middle + half))
            group.propose(low, high, min(1.0, 2 * deviation))
        else:
            sampled.append((group, parts))
    if not sampled:
        return
    device = sampled[0][1][0].source.device
    shares = [[_sample_size(part.source, len(parts)) for part in parts] for _, parts in sampled]
    sample = torch.zeros(len(sampled), max(map(sum, shares)), dtype=torch.int32, device=device)
    for row, (_, parts), sizes in zip(sample, sampled, shares):
        for part, size, slots in zip(parts, sizes, row.split([*sizes, row.numel() - sum(sizes)])):
            slot, at = _sample_positions(part.source, size)
            if at.numel():
                at, slot = at[mine := part.source.candidates.at(at).bool()], slot[mine]
                # A candidate is its key + 1; 0 stays for what is none.
                slots[slot] = part.source.keys_at(at).clamp_(max=TOP - 1).add_(1)
    found = reduce(sample).cpu().numpy()
    for (group, parts), keys, sizes in zip(sampled, found, shares):
        if len(parts) == 1:
            _propose_from(group, np.sort(keys)[::-1][: np.count_nonzero(keys)], None)
            continue
        weights = np.concatenate(
            [np.full(size, _stride(part.source, size)) for part, size in zip(parts, sizes)]
        )
        order = np.argsort(keys[: weights.size])[::-1][: np.count_nonzero(keys)]
        _propose_from(group, keys[order], weights[order])


def _sample_size(source: Source, layers: int) -> int:
    """How many positions of a layer are sampled, at most."""
    size = SAMPLE if layers == 1 else max(256, 4 * SAMPLE // layers)
    return min(source.total, size)


def _stride(source: Source, size: int) -> int:
    """From one sampled position to the next: odd, so that it does not run down a column."""
    return -(-source.total // size) | 1


def _sample_positions(source: Source, size: int) -> tuple[Tensor, Tensor]:
    """(slot, local position) of what this rank holds of a layer's sample, both int64."""
    stride = _stride(source, size)
    first, last = -(-source.start // stride), -(-(source.start + source.numel) // stride)
    slot = torch.arange(first, last, device=source.device)
    return slot, slot * stride - source.start


def _propose_from(group: _Group, keys: np.ndarray, weights: np.ndarray | None) -> None:
    """A bracket of `SIGMAS` standard deviations around the quantile of a descending sample."""
    if not keys.size:
        return
    share = group.k / group.candidates
    rank = np.arange(1, keys.size + 1) if weights is None else np.cumsum(weights)
    total = float(rank[-1])
    half = SIGMAS * (share * (1 - share) / keys.size) ** 0.5 * total
    i, j = np.searchsorted(rank, (share * total - half, share * total + half))
    high = int(keys[i - 1]) - 1 if i > 0 else TOP
    low = int(keys[j + 1]) - 1 if j + 1 < keys.size else 0
    # Ranks of the first and last sampled key inside; ties may widen it.
    begin = int(np.searchsorted(-keys, -(high + 1), "left"))
    end = int(np.searchsorted(-keys, -(low + 1), "right"))
    inside = rank[end - 1] - (rank[begin - 1] if begin else 0) if end > begin else 0
    group.propose(low, high, float(inside) / total)


def _round(live: list[tuple[_Group, list[_Part]]], reduce: Reduce, check: bool) -> None:
    """One exchange: exact counts for every unfinished group, which narrows its bracket."""
    device = live[0][1][0].source.device
    many = max(group.candidates for group, _ in live)
    dtype = torch.int32 if many < 1 << 31 else torch.int64
    # A row: scores that are not finite, keys above the bracket, keys inside it by bin.
    stats = torch.zeros(len(live), 2 + BINS, dtype=dtype, device=device)
    kept = []
    for row, (group, parts) in enumerate(live):
        keep = group.keep
        kept.append(keep)
        for part in parts:
            if group.kept:
                _count_kept(group, part, stats[row])
            else:
                _count_all(group, part, stats[row], keep, check)
    for (group, _), row, keep in zip(live, reduce(stats).cpu().numpy(), kept):
        if row[0]:
            raise ValueError("scores are not finite: no topology update")
        group.narrow(int(row[1]), row[2:].astype(np.int64), keep)


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


def _count_all(group: _Group, part: _Part, row: Tensor, keep: bool, check: bool) -> None:
    """A pass over everything a source holds; keeps what is inside the bracket if asked to."""
    source, above, places, found, finite = part.source, [], [], [], []
    size = min(source.numel, chunk_size(source.device))
    buffer = torch.empty(size, dtype=torch.int32, device=source.device)
    for start, stop in chunks(source.numel, source.device):
        keys = source.keys(start, stop, buffer)
        is_finite = source.is_finite(keys) if check else None
        if is_finite is not None:
            finite.append(is_finite)
        candidates = source.candidates.data[start // 8 : -(-stop // 8)]
        higher, place, inside = _scan(keys, candidates, group.low, group.high)
        above.append(higher)
        place += start
        if keep:
            places.append(place.to(torch.int32) if source.numel < 1 << 31 else place)
            found.append(inside)
        else:  # nothing grows with what lies inside
            _add_bins(group, source, place, inside, row[2:])
    if not above:
        return
    if finite:
        row[0] += (~torch.stack(finite)).any()
    part.above = Bits(torch.cat(above), source.numel) & source.candidates
    row[1] += part.above.count()
    if keep:
        part.found, part.keys = torch.cat(places), torch.cat(found)
        _add_bins(group, source, part.found, part.keys, row[2:])


def _count_kept(group: _Group, part: _Part, row: Tensor) -> None:
    """The same from what an earlier pass kept."""
    if part.found is not None and part.keys is not None:
        now = indices((part.keys >= group.low) & (part.keys <= group.high))
        _add_bins(group, part.source, part.found[now], part.keys[now], row[2:])


def _add_bins(group: _Group, source: Source, found: Tensor, keys: Tensor, bins: Tensor) -> None:
    if group.ties:
        place = found.to(torch.int64) + (source.base + source.start)
        place = place[(place >= group.first) & (place <= group.last)] - group.first
    else:
        place = keys - group.low
    if place.numel():
        index = torch.div(place, group.width, rounding_mode="floor")
        bins += torch.bincount(index, minlength=BINS).to(bins.dtype)


def _chosen(group: _Group, part: _Part) -> Bits:
    """What a finished bracket means for one source."""
    source = part.source
    if group.k == 0 or source.numel == 0:
        return Bits.empty(source.numel, source.device)
    # All that is inside is taken: every key above `low`, and those equal to it up to `last`.
    low, last = group.low, group.last - source.base - source.start

    def taken(found: Tensor, keys: Tensor) -> Tensor:
        if last >= source.numel - 1:
            return keys >= low
        if last < 0:  # perhaps less than what the positions' type holds
            return keys > low
        return (keys > low) | ((keys == low) & (found <= last))

    if group.kept and part.above is not None:
        if part.found is not None and part.keys is not None:
            chosen = indices(taken(part.found, part.keys))
            part.above.add_(part.found[chosen].to(torch.int64))
        return part.above
    packed = []
    for start, stop in chunks(source.numel, source.device):
        found = torch.arange(start, stop, device=source.device)
        packed.append(pack(taken(found, source.keys(start, stop))))
    return Bits(torch.cat(packed), source.numel) & source.candidates
