"""Selections over shards, and what a plain sort chooses: for the tests of `select`."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparse_gpt.topology import bits, passes, select
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import LargestMagnitude, Random, SmallestMagnitude, Source
from sparse_gpt.topology.random import RandomKey, random_scores
from sparse_gpt.topology.select import select_top
from tests.topology.exchange import Rank, on_ranks

Part = tuple[int, int]
KINDS = ["largest", "smallest", "random"]


@dataclass
class Layer:
    """One whole layer, and which positions each rank holds of it."""

    values: Tensor
    candidates: Tensor  # bool
    parts: list[Part]
    name: str = "x"

    @property
    def numel(self) -> int:
        return self.values.numel()

    def source(self, kind: str, rank: int, base: int) -> Source:
        start, stop = self.parts[rank]
        place = (Bits.of(self.candidates[start:stop].contiguous()), start, self.numel, base)
        if kind == "random":
            return Random(RandomKey.of(1, 2, self.name), *place)
        of = LargestMagnitude if kind == "largest" else SmallestMagnitude
        return of(self.values[start:stop], *place)

    def scores(self, kind: str) -> list[float]:
        """Larger is better, in Python's numbers."""
        if kind == "random":
            return random_scores(1, 2, self.name, 0, self.numel).tolist()
        return (self.values.double().abs() * (1 if kind == "largest" else -1)).tolist()


def by_sorting(kind: str, layers: list[Layer], k: int) -> list[set[int]]:
    """The k best candidates of some layers together: by score, then layer, then position."""
    order = [
        (-score, i, at)
        for i, layer in enumerate(layers)
        for at, score in enumerate(layer.scores(kind))
        if layer.candidates[at]
    ]
    best = sorted(order)[:k]
    return [{at for _, i, at in best if i == layer} for layer in range(len(layers))]


def count(layers: list[Layer]) -> int:
    return sum(int(layer.candidates.sum()) for layer in layers)


@dataclass
class Outcome:
    chosen: list[list[set[int]]]  # positions by group and layer
    sent: list[int] = field(default_factory=list)  # bytes of each exchange


def choose(kind: str, groups: list[list[Layer]], counts: list[int]) -> Outcome:
    """What all ranks choose together; checks what a rank says of the part it holds."""
    candidates = [count(layers) for layers in groups]

    def body(rank: Rank) -> tuple[list[list[Bits]], list[int]]:
        sources = []
        for layers in groups:
            bases = [sum(layer.numel for layer in layers[:i]) for i in range(len(layers))]
            sources.append([la.source(kind, rank.index, b) for la, b in zip(layers, bases)])
        return select_top(sources, counts, candidates, rank.sum), rank.sent

    ended = on_ranks(len(groups[0][0].parts), body)
    chosen = [[set() for _ in layers] for layers in groups]
    for rank, (selected, sent) in enumerate(ended):
        assert sent == ended[0][1]
        for layers, found, out in zip(groups, selected, chosen, strict=True):
            for layer, mine, members in zip(layers, found, out, strict=True):
                start, stop = layer.parts[rank]
                assert mine.numel == stop - start
                assert torch.equal(mine.data, Bits.of(mine.flags().bool()).data), "a loose end"
                members |= {start + at for at in mine.positions().tolist()}
    return Outcome(chosen, ended[0][1])


def check(kind: str, groups: list[list[Layer]], counts: list[int]) -> Outcome:
    outcome = choose(kind, groups, counts)
    wanted = [by_sorting(kind, layers, k) for layers, k in zip(groups, counts, strict=True)]
    assert outcome.chosen == wanted
    return outcome


@contextmanager
def tuned(bins=2048, sample=1 << 14, sigmas=5.0, share=1 / 8, chunk=None, native=True):
    """Other constants of the selection; `chunk`: positions looked at at once; with C++ or not."""
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(passes, "native_passes", lambda: None)
        patch.setattr(select, "BINS", bins)
        patch.setattr(select, "SAMPLE", sample)
        patch.setattr(select, "SIGMAS", sigmas)
        patch.setattr(select, "KEPT_SHARE", share)
        if chunk:
            patch.setattr(bits, "chunk_size", lambda device: chunk)
        yield


def many_layers(numel: int, ranks: int, number: int) -> list[Layer]:
    made = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        values = torch.randn(numel, generator=generator)
        edges = [numel * r // ranks for r in range(ranks + 1)]
        parts = list(pairwise(edges))
        made.append(Layer(values, torch.rand(numel, generator=generator) < 0.25, parts, str(i)))
    return made
