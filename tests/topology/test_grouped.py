"""Units in groups that keep their number, over any split of a layer: N:M, tiles, equal rows."""

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.tile_lp import best_totals
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.grouped import GroupedBlocks, GroupedUnits
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.methods.base import drop_and_grow
from sparse_gpt.topology.n_m import random_mask, tiles_of
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.structure import BlockStructure, Groups
from sparse_gpt.topology.units import LayerPart, UnitSet
from tests.topology.exchange import Rank, on_ranks, outcomes

FIRST, KEY = (5, 0), (5, 3)  # of the first masks, and of the update
N_M = [(2, 4), (1, 4), (3, 8), (1, 8)]


@dataclass
class Layers:
    """Weights on some ranks, and the structure of all layers. `edges`: where they are cut."""

    shapes: list[tuple[int, int]]
    groups: list[Groups]
    magnitude: list[Tensor]
    gradient: list[Tensor]
    edges: list[list[int]]

    @property
    def names(self) -> list[str]:
        return [f"h.{i}" for i in range(len(self.shapes))]

    @property
    def totals(self) -> list[int]:
        return [rows * columns for rows, columns in self.shapes]

    @property
    def counts(self) -> list[int]:
        return [g.active(total) for g, total in zip(self.groups, self.totals, strict=True)]

    @property
    def ranks(self) -> int:
        return len(self.edges[0]) - 1

    def of(self, rank: int, values: list[Tensor]) -> list[Tensor]:
        ranges = [list(pairwise(cuts))[rank] for cuts in self.edges]
        return [v[a:b] for (a, b), v in zip(ranges, values, strict=True)]

    def set_of(self, rank: int, members: list[Tensor]) -> UnitSet:
        sizes = [int(m.sum()) for m in members]
        return UnitSet([Bits.of(m) for m in self.of(rank, members)], sizes, self.totals)

    def units(self, rank: Rank, key: tuple[int, int] = KEY) -> GroupedUnits:
        starts = [list(pairwise(cuts))[rank.index][0] for cuts in self.edges]
        parts = zip(starts, self.of(rank.index, self.magnitude), self.of(rank.index, self.gradient))
        return GroupedUnits(self.names, [LayerPart(*p) for p in parts], rank.sum, key, self.groups)

    def joined(self, results: list[UnitSet]) -> list[Tensor]:
        """What every rank has, put together; sizes must be right."""
        out = [torch.zeros(total, dtype=torch.bool) for total in self.totals]
        for rank, units in enumerate(results):
            for i, bits in enumerate(units.parts):
                start, stop = list(pairwise(self.edges[i]))[rank]
                assert bits.numel == stop - start
                out[i][start:stop] = bits.flags().bool()
        assert all(units.sizes == [int(m.sum()) for m in out] for units in results)
        assert all(units.totals == self.totals for units in results)
        return out

    def drawn(self) -> list[Tensor]:
        everything = [torch.ones(total, dtype=torch.bool) for total in self.totals]
        return self.joined(on_ranks(self.ranks, lambda rank: self.units(rank, FIRST).pattern(
            "random", self.set_of(rank.index, everything), self.counts)))  # fmt: skip

    def updated(self, active: list[Tensor], fraction: float, growth: str) -> list[Tensor]:
        def body(rank: Rank) -> UnitSet:
            old = self.set_of(rank.index, active)
            return drop_and_grow(self.units(rank), old, fraction, growth).sets.forward

        return self.joined(on_ranks(self.ranks, body))


def as_layers(kinds: list[tuple[str, tuple[int, int]]], rng: random.Random, ranks: int) -> Layers:
    """Random layers: values are of a few, so that choices are among equals."""
    structures = {
        "rows": BlockStructure(balanced=True),
        **{f"{n}:{m}": BlockStructure(n_m=(n, m)) for n, m in N_M},
        **{f"{n}:{m}T": BlockStructure(n_m=(n, m), transposable=True) for n, m in N_M},
    }
    made = Layers([], [], [], [], [])
    for kind, shape in kinds:
        rows, columns = shape
        total = rows * columns
        if kind == "rows":
            active = rows * rng.randint(1, columns - 1)
        else:
            n, m = map(int, kind.strip("T").split(":"))
            active = total // m * n
        made.shapes.append(shape)
        groups = structures[kind].groups(shape, active)
        assert groups is not None
        made.groups.append(groups)
        several = [rng.choice([0.0, 0.25, -0.25, 0.5, -1.0, 1e-3 * rng.random()]) for _ in range(5)]
        made.magnitude.append(torch.tensor(rng.choices(several, k=total)))
        made.gradient.append(torch.tensor(rng.choices([*several, rng.random()], k=total)))
        made.edges.append([0, *sorted(rng.choices(range(total + 1), k=ranks - 1)), total])
    return made


@st.composite
def layers(draw, kinds: list[str]) -> Layers:
    rng = random.Random(draw(st.integers(0, 2**32)))
    chosen = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2)):
        m = 1 if kind == "rows" else int(kind.strip("T").split(":")[1])
        rows = rng.randint(1, 3) * (m if kind.endswith("T") else 1)
        chosen.append((kind, (rows, m * rng.randint(1, 3) if m > 1 else rng.randint(2, 9))))
    return as_layers(chosen, rng, draw(st.integers(1, 4)))


def kept_of(active: Tensor, magnitude: Tensor, fraction: float) -> Tensor:
    """Without the smallest of a layer, in Python."""
    places = active.nonzero().view(-1).tolist()
    places.sort(key=lambda i: (abs(float(magnitude[i])), i))
    kept = active.clone()
    kept[places[: int(fraction * len(places))]] = False
    return kept


def growth_of(made: Layers, i: int, growth: str) -> list[float]:
    if growth == "random":
        return random_scores(*KEY, made.names[i], 0, made.totals[i]).tolist()
    return made.gradient[i].abs().tolist()


@settings(max_examples=80, deadline=None)
@given(
    layers(["rows", "2:4", "3:8"]),
    st.sampled_from(["largest gradient", "random"]),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_groups_grow_what_they_lost(made, growth, fraction):
    active = made.drawn()
    new = made.updated(active, fraction, growth)
    for i, groups in enumerate(made.groups):
        scores = growth_of(made, i, growth)
        drawn = random_scores(*FIRST, made.names[i], 0, made.totals[i]).tolist()
        kept = kept_of(active[i], made.magnitude[i], fraction).tolist()
        wanted, start = list(kept), [False] * made.totals[i]
        for first in range(0, made.totals[i], groups.width):
            group = range(first, first + groups.width)
            for place in sorted(group, key=lambda p: (-drawn[p], p))[: groups.quota]:
                start[place] = True
            free = sorted((p for p in group if not kept[p]), key=lambda p: (-scores[p], p))
            for place in free[: groups.quota - sum(kept[p] for p in group)]:
                wanted[place] = True
        assert active[i].tolist() == start
        assert new[i].tolist() == wanted


@settings(max_examples=50, deadline=None)
@given(
    layers(["2:4T", "1:4T", "3:8T"]),
    st.sampled_from(["largest gradient", "random"]),
    st.sampled_from([0.3, 0.7, 1.0]),
)
def test_tiles_that_lost_weights_are_solved_again(made, growth, fraction):
    active = made.drawn()
    new = made.updated(active, fraction, growth)
    for i, groups in enumerate(made.groups):
        m, shape = groups.width, made.shapes[i]

        def tiled(flat: Tensor, m: int = m, shape: tuple[int, int] = shape) -> Tensor:
            return tiles_of(flat.view(shape), m)

        n = groups.quota
        drawn = random_mask(*FIRST, made.names[i], shape, n, m, transposable=True)
        assert torch.equal(active[i].view(shape), drawn)
        before, after = tiled(active[i]), tiled(new[i])
        kept = tiled(kept_of(active[i], made.magnitude[i], fraction))
        scores = tiled(torch.tensor(growth_of(made, i, growth), dtype=torch.float64))
        assert (after.sum(1) == n).all() and (after.sum(2) == n).all()
        assert (kept & ~after).sum() == 0, "what was kept stays"
        untouched = (kept == before).all(2).all(1)
        assert torch.equal(after[untouched], before[untouched])
        if untouched.all():
            continue
        # The best that can join what was kept, by a program in which that is worth most.
        lost = ~untouched
        worth = scores[lost] / max(float(scores.max()), 1.0)
        pinned = torch.where(kept[lost], 1e3, worth)
        best = best_totals(pinned, n) - 1e3 * kept[lost].sum((1, 2)).numpy()
        found = (worth * (after & ~kept)[lost]).sum((1, 2)).numpy()
        assert np.all(found >= best - 1e-6)


@pytest.mark.parametrize("kind", ["rows", "2:4", "2:4T", "1:8T"])
@pytest.mark.parametrize("growth", ["largest gradient", "random"])
def test_every_split_gives_the_same(kind, growth):
    shapes = [(kind, (16, 24)), (kind, (8, 8))]
    wanted = None
    for ranks, seed in [(1, 0), *((ranks, seed) for ranks in (2, 3, 5) for seed in range(3))]:
        made = as_layers(shapes, random.Random(1), 1)
        cuts = random.Random(seed)
        made.edges = [
            [0, *sorted(cuts.choices(range(total + 1), k=ranks - 1)), total]
            for total in made.totals
        ]
        active = made.drawn()
        new = made.updated(active, 0.5, growth)
        wanted = wanted or (active, new)
        for mine, theirs in zip((*active, *new), (*wanted[0], *wanted[1]), strict=True):
            assert torch.equal(mine, theirs)
    assert wanted is not None
    assert not torch.equal(wanted[0][0], wanted[1][0])


@pytest.mark.parametrize("growth", ["largest gradient", "random"])
def test_rows_of_blocks(growth):
    """As single weights with the same scores, in whole numbers."""
    made = as_layers([("rows", (6, 10)), ("rows", (3, 7))], random.Random(2), 1)
    for of in (made.magnitude, made.gradient):
        of[:] = [(values * 8).round().abs() for values in of]
    scores = {"magnitude": [v.long() for v in made.magnitude],
              "gradient": [v.long() for v in made.gradient]}  # fmt: skip
    units, first = (GroupedBlocks(made.names, scores, key, made.groups) for key in (KEY, FIRST))
    everything = [torch.ones(total, dtype=torch.bool) for total in made.totals]
    active = first.pattern("random", made.set_of(0, everything), made.counts)
    assert units.misfits(active) == []
    assert [a.tolist() for a in made.joined([active])] == [a.tolist() for a in made.drawn()]
    new = drop_and_grow(units, active, 0.5, growth).sets.forward
    wanted = made.updated(made.drawn(), 0.5, growth)
    assert [a.tolist() for a in made.joined([new])] == [a.tolist() for a in wanted]
    moved = [made.drawn()[0], made.drawn()[1].roll(1)]
    assert units.misfits(made.set_of(0, moved)) == ["h.1"]


@pytest.mark.parametrize("kind", ["rows", "2:4", "2:4T"])
def test_misfits_are_found_on_every_rank(kind):
    made = as_layers([(kind, (8, 16))] * 3, random.Random(3), 4)
    active = made.drawn()
    moved = [flags.clone() for flags in active]
    moved[1] = moved[1].roll(1)
    for flags, wanted in ((active, []), (moved, ["h.1"])):
        found = on_ranks(made.ranks, lambda rank, flags=flags: made.units(rank).misfits(
            made.set_of(rank.index, flags)))  # fmt: skip
        assert found == [wanted] * made.ranks
    if kind == "2:4T":  # rows alone are not enough
        moved[1] = random_mask(0, 0, "h", (8, 16), 2, 4, transposable=False).view(-1)
        found = on_ranks(made.ranks, lambda rank: made.units(rank).misfits(
            made.set_of(rank.index, moved)))  # fmt: skip
        assert found == [["h.1"]] * made.ranks


@pytest.mark.parametrize("kind", ["2:4", "2:4T"])
def test_a_score_that_is_not_finite_on_one_rank_is_refused_on_every_rank(kind):
    made = as_layers([(kind, (8, 8))], random.Random(4), 3)
    active = made.drawn()
    made.gradient[0][-1] = float("inf")
    ended = outcomes(made.ranks, lambda rank: drop_and_grow(
        made.units(rank), made.set_of(rank.index, active), 0.5, "largest gradient"))  # fmt: skip
    assert [type(error) for _, error in ended] == [NonFiniteScores] * 3


def test_what_groups_cannot_be():
    two_four = BlockStructure(n_m=(2, 4))
    assert BlockStructure().groups((8, 8), 5) is None
    assert two_four.groups((3, 8), 12) == Groups(4, 2, 8)
    for structure, shape, units in (
        (two_four, (8, 6), 24),
        (two_four, (8, 8), 31),
        (BlockStructure(n_m=(2, 4), transposable=True), (6, 8), 24),
        (BlockStructure(balanced=True), (6, 8), 25),
    ):
        with pytest.raises(ValueError, match="groups of"):
            structure.groups(shape, units)


def test_a_pattern_of_some_units_is_refused():
    made = as_layers([("2:4", (4, 8))], random.Random(5), 1)
    (units,) = on_ranks(1, made.units)
    active = made.set_of(0, made.drawn())
    assert units.pattern("random", active, made.counts) is active
    less = active - units.best("random", active, [1])
    with pytest.raises(RuntimeError, match="from all units"):
        units.pattern("random", less, made.counts)


@pytest.mark.parametrize("kind", ["rows", "2:4", "2:4T", "3:8T"])
def test_what_grows_is_none_of_what_was_kept(kind):
    made = as_layers([(kind, (8, 16))], random.Random(6), 1)
    active = made.set_of(0, made.drawn())
    (units,) = on_ranks(1, made.units)
    counts = [active.sizes[0] // 2]
    kept = active - units.best("smallest magnitude", active, counts)
    grown = units.grow("random", kept, active, counts)
    assert grown.sizes == counts == [int(grown.parts[0].count())]
    assert int((grown.parts[0] & kept.parts[0]).count()) == 0


@pytest.mark.parametrize("kind", ["rows", "2:4T"])
def test_a_dense_phase_has_all_units(kind):
    made = as_layers([(kind, (8, 8))], random.Random(7), 1)
    everything = made.set_of(0, [torch.ones(64, dtype=torch.bool)])
    (units,) = on_ranks(1, made.units)
    dense = units.pattern("random", everything, [64])
    assert (dense.sizes, int(dense.parts[0].count())) == ([64], 64)
    assert units.misfits(dense) == []
