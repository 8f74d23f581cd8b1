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

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import NonFiniteScores, Source
from sparse_gpt.topology.passes import TOP, Bracket, Part

Reduce = Callable[[Tensor], Tensor]

BINS = 2048
SAMPLE = 1 << 12  # positions a layer, at most
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
    def bracket(self) -> Bracket:
        low, high = (self.first, self.last) if self.ties else (self.low, self.high)
        width = -(-(high - low + 1) // BINS)
        return Bracket(self.low, self.high, self.first, self.last, self.ties, width)

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
        self.kept, width = kept, self.bracket.width
        order = bins if self.ties else bins[::-1]
        counts = np.cumsum(order)
        i = int(counts.searchsorted(self.need))
        self.taken += int(counts[i] - order[i])
        self.inside = int(order[i])
        if self.ties:
            self.first += i * width
            self.last = min(self.last, self.first + width - 1)
        else:
            self.low += (BINS - 1 - i) * width
            self.high = min(self.high, self.low + width - 1)
            self.ties = self.low == self.high


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
        states.append((_Group(k, many, positions), [Part(source) for source in sources]))
    live = [state for state in states if not state[0].done]
    _propose(live, reduce)
    first = True
    while live := [state for state in states if not state[0].done]:
        _round(live, reduce, check=first)
        first = False
    return [_chosen(group, parts) for group, parts in states]


def _propose(live: list[tuple[_Group, list[Part]]], reduce: Reduce) -> None:
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
        first = 0
        for part, size in zip(parts, sizes):
            part.sample(_stride(part.source, size), row[first : first + size])
            first += size
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


def _propose_from(group: _Group, keys: np.ndarray, weights: np.ndarray | None) -> None:
    """A bracket of `SIGMAS` standard deviations around the quantile of a descending sample."""
    if not keys.size:
        return
    share = group.k / group.candidates
    rank = np.arange(1, keys.size + 1) if weights is None else np.cumsum(weights)
    total = float(rank[-1])
    half = SIGMAS * (share * (1 - share) / keys.size) ** 0.5 * total
    i, j = rank.searchsorted((share * total - half, share * total + half))
    high = int(keys[i - 1]) - 1 if i > 0 else TOP
    low = int(keys[j + 1]) - 1 if j + 1 < keys.size else 0
    # Ranks of the first and last sampled key inside; ties may widen it.
    ascending = keys[::-1]
    begin = keys.size - int(ascending.searchsorted(high + 1, "right"))
    end = keys.size - int(ascending.searchsorted(low + 1, "left"))
    inside = rank[end - 1] - (rank[begin - 1] if begin else 0) if end > begin else 0
    group.propose(low, high, float(inside) / total)


def _round(live: list[tuple[_Group, list[Part]]], reduce: Reduce, check: bool) -> None:
    """One exchange: exact counts for every unfinished group, which narrows its bracket."""
    device = live[0][1][0].source.device
    many = max(group.candidates for group, _ in live)
    dtype = torch.int32 if many < 1 << 31 else torch.int64
    # A row: scores that are not finite, keys above the bracket, keys inside it by bin.
    stats = torch.zeros(len(live), 2 + BINS, dtype=dtype, device=device)
    kept = []
    for row, (group, parts) in enumerate(live):
        keep, bracket = group.keep, group.bracket
        kept.append(keep)
        for part in parts:
            if group.kept:
                part.count_kept(bracket, stats[row])
            else:
                part.count_all(bracket, stats[row], keep, check)
    for (group, _), row, keep in zip(live, reduce(stats).cpu().numpy(), kept):
        if row[0]:
            raise NonFiniteScores
        group.narrow(int(row[1]), row[2:].astype(np.int64), keep)


def _chosen(group: _Group, parts: list[Part]) -> list[Bits]:
    """What a finished bracket means for sources: all above it and in it is taken."""
    if group.k == 0:
        return [Bits.empty(part.source.numel, part.source.device) for part in parts]
    bracket = group.bracket
    return [part.chosen(bracket, group.kept) for part in parts]
