"""Sets of units, and the best of them, spread over ranks or known to all."""

import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_gpt.model.flops import kept_units
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, UnitSet
from tests.topology.exchange import Rank, on_ranks, outcomes

SCORES = ["smallest magnitude", "largest gradient", "random"]
KEY = (5, 3)


@dataclass
class Model:
    """Layers of units on some ranks: what they score, which are members, and who holds what."""

    magnitude: list[Tensor]
    gradient: list[Tensor]
    members: list[Tensor]  # bool
    edges: list[list[int]]
    whole_model: bool

    @property
    def names(self) -> list[str]:
        return [f"h.{i}" for i in range(len(self.members))]

    @property
    def sizes(self) -> list[int]:
        return [int(flags.sum()) for flags in self.members]

    @property
    def totals(self) -> list[int]:
        return [flags.numel() for flags in self.members]

    def part(self, rank: int, of: list[Tensor]) -> list[tuple[int, Tensor]]:
        ranges = [list(pairwise(cuts))[rank] for cuts in self.edges]
        return [(a, values[a:b]) for (a, b), values in zip(ranges, of, strict=True)]

    def set_of(self, rank: int) -> UnitSet:
        bits = [Bits.of(flags.contiguous()) for _, flags in self.part(rank, self.members)]
        return UnitSet(bits, self.sizes, self.totals)

    def sharded(self, rank: Rank) -> ShardedUnits:
        magnitudes, gradients = (
            self.part(rank.index, of) for of in (self.magnitude, self.gradient)
        )
        parts = [LayerPart(a, m, g) for (a, m), (_, g) in zip(magnitudes, gradients)]
        return ShardedUnits(self.names, parts, rank.sum, KEY, self.whole_model)

    def blocks(self) -> BlockUnits:
        scores = {"magnitude": self.magnitude, "gradient": self.gradient}
        return BlockUnits(self.names, scores, KEY, self.whole_model)

    def by_sorting(self, score: str, counts: list[int]) -> list[set[int]]:
        """Best first: by the score, then by layer and index. Blocks score by their own number."""
        order = []
        for i, flags in enumerate(self.members):
            if score == "random":
                values = random_scores(*KEY, self.names[i], 0, flags.numel()).tolist()
            elif score == "smallest magnitude":
                values = [-abs(value) for value in self.magnitude[i].tolist()]
            else:
                values = [abs(value) for value in self.gradient[i].tolist()]
            order += [(-values[at], i, at) for at in flags.nonzero().view(-1).tolist()]
        order.sort()
        layers = range(len(self.members))
        if self.whole_model:
            return [{at for _, i, at in order[: counts[0]] if i == layer} for layer in layers]
        mine = [[at for _, i, at in order if i == layer] for layer in layers]
        return [set(places[:count]) for places, count in zip(mine, counts, strict=True)]


FEW = [0.0, 0.25, -0.25, 0.5, 0.5000001, 1.0]
NUMBERS = [0, 1, 2, 3, 2**62, 2**62 - 1]


@st.composite
def models(draw, pool=FEW, dtype=torch.float32, ranks: int | None = None):
    """(model, counts): values of a few, so that choices are among equals."""
    ranks = ranks or draw(st.integers(1, 5))
    rng = random.Random(draw(st.integers(0, 2**32)))
    made = Model([], [], [], [], whole_model=draw(st.booleans()))
    for _ in range(draw(st.integers(1, 3))):
        numel = rng.randint(1, 30)
        several = rng.sample(pool, rng.randint(1, len(pool)))
        for of in (made.magnitude, made.gradient):
            of.append(torch.tensor(rng.choices(several, k=numel), dtype=dtype))
        made.members.append(torch.tensor(rng.choices([True, False], k=numel)))
        made.edges.append([0, *sorted(rng.choices(range(numel + 1), k=ranks - 1)), numel])
    many = [sum(made.sizes)] if made.whole_model else made.sizes
    return made, [rng.choice([0, n, *(rng.randint(0, n) for _ in range(4))]) for n in many]


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from(SCORES))
def test_the_best_of_sharded_units(case, score):
    model, counts = case

    def body(rank: Rank):
        return model.sharded(rank).best(score, model.set_of(rank.index), counts)

    ended = on_ranks(len(model.edges[0]) - 1, body)
    found = [set() for _ in model.members]
    for rank, best in enumerate(ended):
        for layer, bits, (start, part) in zip(found, best.parts, model.part(rank, model.members)):
            assert bits.numel == part.numel()
            layer |= {start + at for at in bits.positions().tolist()}
        assert best.totals == model.totals
    assert found == model.by_sorting(score, counts)
    assert all(best.sizes == [len(layer) for layer in found] for best in ended)


def positions(units: UnitSet) -> list[set[int]]:
    return [set(bits.positions().tolist()) for bits in units.parts]


@settings(max_examples=100, deadline=None)
@given(models(NUMBERS, torch.int64, 1), st.sampled_from(SCORES))
def test_the_best_of_blocks(case, score):
    model, counts = case
    best = model.blocks().best(score, model.set_of(0), counts)
    wanted = model.by_sorting(score, counts)
    assert positions(best) == wanted
    assert best.sizes == [len(layer) for layer in wanted] and best.totals == model.totals


@settings(max_examples=60, deadline=None)
@given(models([0, 1, 2, 3, 1000], torch.int64, 1), st.sampled_from(SCORES))
def test_both_choose_the_same(case, score):
    """Blocks of one weight, scored in whole numbers, are single weights."""
    model, counts = case
    blocks = model.blocks().best(score, model.set_of(0), counts)
    for of in (model.magnitude, model.gradient):
        of[:] = [values.float() for values in of]
    (single,) = on_ranks(1, lambda rank: model.sharded(rank).best(score, model.set_of(0), counts))
    assert positions(blocks) == positions(single)
    assert (blocks.sizes, blocks.totals) == (single.sizes, single.totals)


@given(models(ranks=1), st.data())
def test_set_algebra(case, data):
    model, _ = case
    everything, members = model.set_of(0), positions(model.set_of(0))
    chosen = [data.draw(st.sets(st.sampled_from(sorted(m)))) if m else set() for m in members]
    flags = [
        torch.tensor([i in some for i in range(total)], dtype=torch.bool)
        for some, total in zip(chosen, model.totals)
    ]
    subset = UnitSet([Bits.of(f) for f in flags], [len(some) for some in chosen], model.totals)
    rest, others = everything - subset, ~everything

    def is_what(units: UnitSet, wanted: list[set[int]]) -> bool:
        sizes = [len(some) for some in wanted]
        return (positions(units), units.sizes, units.totals) == (wanted, sizes, model.totals)

    assert is_what(rest, [m - some for m, some in zip(members, chosen)])
    assert is_what(rest | subset, members)
    assert is_what(others, [set(range(n)) - m for m, n in zip(members, model.totals)])
    assert is_what(others | subset, [set(range(n)) - m | some for m, some, n in
                                     zip(members, chosen, model.totals)])  # fmt: skip
    assert is_what(everything, members) and is_what(subset, chosen), "operands are left alone"


def two_layers(whole_model: bool) -> Model:
    flags = [torch.arange(10) < 9, torch.arange(20) < 6]
    values = [torch.arange(10.0), torch.arange(20.0)]
    return Model(values, values, flags, [[0, 4, 10], [0, 20, 20]], whole_model)


def test_shares_are_rounded_down():
    for whole_model, share, same in ((False, [2, 1], [9, 6]), (True, [4], [15])):
        model = two_layers(whole_model)
        members = model.set_of(0)
        for units in (model.blocks(), *on_ranks(1, model.sharded)):
            assert units.share(members, 0.3) == share
            assert units.share(members, 0.0) == [0] * len(share)
            assert units.share(members, 1.0) == same


@pytest.mark.parametrize("counts", [[-1, 2], [2, 7]])
@pytest.mark.parametrize("score", SCORES)
def test_a_count_that_cannot_be_is_refused_on_every_rank(counts, score):
    model = two_layers(whole_model=False)
    ended = outcomes(2, lambda rank: model.sharded(rank).best(
        score, model.set_of(rank.index), counts))  # fmt: skip
    model.edges = [[0, 10], [0, 20]]
    model.magnitude = model.gradient = [values.long() for values in model.magnitude]
    ended += outcomes(1, lambda _: model.blocks().best(score, model.set_of(0), counts))
    assert all(isinstance(error, ValueError) for _, error in ended)
    assert all("cannot choose" in str(error) for _, error in ended)


@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("score", SCORES[:2])
def test_a_score_that_is_not_finite_on_one_rank_is_refused_on_every_rank(whole_model, score):
    model = two_layers(whole_model)
    (model.magnitude if score == SCORES[0] else model.gradient)[0][2] = float("nan")
    counts = [3] if whole_model else [2, 2]
    ended = outcomes(2, lambda rank: model.sharded(rank).best(
        score, model.set_of(rank.index), counts))  # fmt: skip
    assert [type(error) for _, error in ended] == [NonFiniteScores] * 2


def test_growth_by_gradient_without_one_is_refused():
    parts = [LayerPart(0, torch.ones(4))]
    units = ShardedUnits(["h.7"], parts, lambda values: values, KEY)
    members = UnitSet([~Bits.empty(4)], [4], [4])
    with pytest.raises(ValueError, match=r"h\.7: this step has no dense gradient"):
        units.best("largest gradient", members, [1])


def test_random_units_differ_by_layer_seed_and_update():
    """And by nothing else: the first masks of a run are drawn this way."""

    def drawn(name: str, key: tuple[int, int]) -> set[int]:
        parts = [LayerPart(0, torch.zeros(0))]
        units = ShardedUnits([name], parts, lambda values: values, key)
        (found,) = positions(units.best("random", ~UnitSet([Bits.empty(1024)], [0], [1024]), [256]))
        return found

    keys = [("a", (1, 0)), ("b", (1, 0)), ("a", (2, 0)), ("a", (1, 1))]
    sets = [drawn(*key) for key in keys]
    overlaps = [len(sets[i] & sets[j]) for i in range(4) for j in range(i)]
    assert all(30 < overlap < 98 for overlap in overlaps)  # 64 +- 5 sigma by chance
    assert drawn(*keys[0]) == sets[0] and all(len(found) == 256 for found in sets)


@given(st.integers(1, 10**12), st.integers(0, 999))
def test_kept_units_is_the_exact_share(units, thousandths):
    share = (1 - Fraction(thousandths, 1000)) * units
    nearest = int(share) + (share - int(share) > Fraction(1, 2))
    half = share - int(share) == Fraction(1, 2)
    wanted = int(share) + int(share) % 2 if half else nearest
    assert kept_units(units, thousandths / 1000) == max(1, wanted)
