"""Ranks as threads of one process, and the all-reduces between them.

    def total(rank: Rank) -> int:
        return int(rank.sum(torch.tensor([rank.index])))

    assert on_ranks(3, total) == [3, 3, 3]

Far cheaper than processes, so properties can be tried on thousands of splits. A rank that ends
while others wait for it, or that calls something else than they do, fails them at once.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SECONDS = 30.0
EXCHANGES = 200  # a rank makes at most: a selection that never ends fails


class Deserted(RuntimeError):
    """Another rank ended, or did not come to a collective in time."""


class _Meeting:
    """Where ranks leave what they reduce: a dict of rank -> (operation, tensor) a collective."""

    def __init__(self, ranks: int, seconds: float) -> None:
        self.ranks, self.seconds = ranks, seconds
        self.change = threading.Condition()
        self.brought: list[dict[int, tuple[str, Tensor]]] = []
        self.ended: set[int] = set()

    def end(self, rank: int) -> None:
        with self.change:
            self.ended.add(rank)
            self.change.notify_all()

    def bring(self, rank: int, number: int, operation: str, values: Tensor) -> list[Tensor]:
        """What every rank brings to its collective of that number, in rank order."""
        with self.change:
            while len(self.brought) <= number:
                self.brought.append({})
            here = self.brought[number]
            here[rank] = operation, values.clone()
            self.change.notify_all()
            if not self.change.wait_for(
                lambda: len(here) == self.ranks or self.ended - here.keys(), self.seconds
            ):
                raise Deserted(f"rank {rank}, collective {number}: only {sorted(here)} came")
            if len(here) < self.ranks:
                gone = sorted(self.ended - here.keys())
                raise Deserted(f"rank {rank}, collective {number}: ranks {gone} ended before it")
            calls = {(what, tuple(t.shape), t.dtype) for what, t in here.values()}
            if len(calls) > 1:
                raise RuntimeError(f"ranks are in different collectives: {calls}")
            return [here[r][1] for r in range(self.ranks)]


@dataclass
class Rank:
    """One rank: its collectives, and the bytes it sent in each."""

    index: int
    meeting: _Meeting
    sent: list[int] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        return self._reduce("sum", values).sum(0, dtype=values.dtype)

    def max(self, values: Tensor) -> Tensor:
        return self._reduce("max", values).amax(0)

    def _reduce(self, operation: str, values: Tensor) -> Tensor:
        if len(self.sent) == EXCHANGES:
            raise RuntimeError(f"rank {self.index} has made {EXCHANGES} exchanges")
        brought = self.meeting.bring(self.index, len(self.sent), operation, values)
        self.sent.append(values.numel() * values.element_size())
        values.fill_(77)  # an all-reduce may or may not be in place: what was given is spoilt
        return torch.stack(brought)


def outcomes(
    ranks: int, run: Callable[[Rank], Any], seconds: float = SECONDS
) -> list[tuple[Any, BaseException | None]]:
    """`run(rank)` in a thread a rank: what each returned, or None and what it raised."""
    meeting = _Meeting(ranks, seconds)
    ended: list[tuple[Any, BaseException | None]] = [(None, Deserted("did not end"))] * ranks

    def body(index: int) -> None:
        try:
            ended[index] = run(Rank(index, meeting)), None
        except BaseException as error:
            ended[index] = None, error
        finally:
            meeting.end(index)

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * seconds)
    return ended


def on_ranks(ranks: int, run: Callable[[Rank], Any], seconds: float = SECONDS) -> list[Any]:
    """`run(rank)` in a thread a rank; results in rank order. Raises what a rank raised."""
    ended = outcomes(ranks, run, seconds)
    errors = [error for _, error in ended if error is not None]
    own = [error for error in errors if not isinstance(error, Deserted)]
    if errors:
        raise (own or errors)[0]
    return [result for result, _ in ended]


@st.composite
def splits(draw: st.DrawFn, total: int, ranks: int = 5) -> list[tuple[int, int]]:
    """`[start, stop)` of every rank, 1 to `ranks` of them, that together cover `total` positions.

    Boundaries are anywhere, so parts may be empty; ranks hold them in any order.
    """
    inner = draw(st.lists(st.integers(0, total), max_size=ranks - 1))
    edges = [0, *sorted(inner), total]
    return draw(st.permutations(list(pairwise(edges))))


def whole(parts: list[tuple[int, int]], of: list[Tensor], total: int) -> Tensor:
    """What every rank has of its part, put together."""
    out = torch.empty(total, dtype=of[0].dtype)
    for (start, stop), values in zip(parts, of, strict=True):
        out[start:stop] = values
    return out
