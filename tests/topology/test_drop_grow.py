"""Drop and grow, as SET and RigL share it, against an independent oracle in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.methods.base import Sets, drop_and_grow
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.schedule import UpdateSchedule
from sparse_gpt.topology.units import BlockUnits, LayerPart, ShardedUnits, Units, UnitSet

WHOLE = st.sampled_from([0, 1, 2, 3]) | st.integers(0, 1000)
KEY = (9, 4)


@st.composite
def cases(draw):
    """(active, magnitude, gradient) by layer; inactive weights are 0. Whole numbers."""
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(1, 20))
        active = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        drawn = draw(st.lists(WHOLE, min_size=n, max_size=n))
        magnitude = [m if a else 0 for m, a in zip(drawn, active)]
        layers.append((active, magnitude, draw(st.lists(WHOLE, min_size=n, max_size=n))))
    return [list(of) for of in zip(*layers)]


FRACTIONS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.99, 1.0])


def oracle(active, magnitude, growth, fraction):
    """One removal and one insertion at a time, by repeated minimum and maximum.

    Units are (layer, index), over the layers given.
    """
    everything = [(i, j) for i, flags in enumerate(active) for j in range(len(flags))]
    kept = {(i, j) for i, j in everything if active[i][j]}
    count = int(fraction * len(kept))
    for _ in range(count):
        kept.remove(min(kept, key=lambda u: (magnitude[u[0]][u[1]], u)))
    new = set(kept)
    for _ in range(count):
        # max takes the first of equals
        new.add(max(sorted(set(everything) - new), key=lambda u: growth[u[0]][u[1]]))
    return new


def wanted(active, magnitude, growth, fraction, whole_model):
    if whole_model:
        return oracle(active, magnitude, growth, fraction)
    new = set()
    for i, layer in enumerate(zip(active, magnitude, growth)):
        new |= {(i, j) for _, j in oracle(*([of] for of in layer), fraction)}
    return new


def names(active):
    return [f"h.{i}" for i in range(len(active))]


def sharded(active, magnitude, gradient, whole_model) -> ShardedUnits:
    parts = [
        LayerPart(0, torch.tensor(m, dtype=torch.float32), -torch.tensor(g, dtype=torch.float32))
        for m, g in zip(magnitude, gradient)
    ]
    return ShardedUnits(names(active), parts, lambda values: values, KEY, whole_model)


def blocks(active, magnitude, gradient, whole_model) -> BlockUnits:
    scores = {
        "magnitude": [torch.tensor(m, dtype=torch.int64) for m in magnitude],
        "gradient": [torch.tensor(g, dtype=torch.int64) for g in gradient],
    }
    return BlockUnits(names(active), scores, KEY, whole_model)


def set_of(active) -> UnitSet:
    parts = [Bits.of(torch.tensor(flags)) for flags in active]
    return UnitSet(parts, [sum(flags) for flags in active], [len(flags) for flags in active])


def members(units: UnitSet) -> set[tuple[int, int]]:
    return {(i, j) for i, bits in enumerate(units.parts) for j in bits.positions().tolist()}


def moved(units: Units, active, fraction: float, method: str) -> set[tuple[int, int]]:
    before = set_of(active)
    schedule = UpdateSchedule(1, 10, init=fraction, kind="constant")
    update = METHODS[method](schedule).update(units, Sets(before), before.sizes, 1)
    new = update.sets.forward
    assert update.sets.trained is None
    assert members(before) == members(set_of(active)), "the old topology is left alone"
    assert new.totals == before.totals
    assert new.sizes == [int(bits.count()) for bits in new.parts]
    assert sum(new.sizes) == sum(before.sizes), "the number of active units is conserved"
    assert units.whole_model or new.sizes == before.sizes, "in every layer"
    count = sum(units.share(before, fraction))
    assert update.dropped == count
    assert len(members(new) - members(before)) <= count
    return members(new)


@settings(max_examples=100, deadline=None)
@given(cases(), FRACTIONS, st.booleans(), st.sampled_from([sharded, blocks]))
def test_rigl_against_the_oracle(case, fraction, whole_model, units):
    new = moved(units(*case, whole_model), case[0], fraction, "rigl")
    assert new == wanted(*case, fraction, whole_model)


@settings(max_examples=100, deadline=None)
@given(cases(), FRACTIONS, st.booleans(), st.sampled_from([sharded, blocks]))
def test_set_against_the_oracle(case, fraction, whole_model, units):
    active, magnitude, _ = case
    growth = [
        random_scores(*KEY, name, 0, len(flags)).tolist()
        for name, flags in zip(names(active), active)
    ]
    new = moved(units(*case, whole_model), active, fraction, "set")
    assert new == wanted(active, magnitude, growth, fraction, whole_model)


@pytest.mark.parametrize("units", [sharded, blocks])
def test_a_dropped_unit_may_come_back(units):
    case = [[[True, True, False]], [[1, 9, 0]], [[5, 9, 4]]]
    assert moved(units(*case, False), case[0], 0.5, "rigl") == {(0, 0), (0, 1)}


@pytest.mark.parametrize("units", [sharded, blocks])
def test_dropping_none_or_all(units):
    case = [[[True, False, True, False]], [[7, 0, 8, 0]], [[0, 10, 5, 20]]]
    assert moved(units(*case, False), case[0], 0.0, "rigl") == {(0, 0), (0, 2)}
    assert moved(units(*case, False), case[0], 1.0, "rigl") == {(0, 1), (0, 3)}


@pytest.mark.parametrize("units", [sharded, blocks])
def test_over_the_model_units_move_between_layers(units):
    """Ties go to the earlier layer, in dropping and in growing."""
    active = [[True, True, False], [True, True, False]]
    case = [active, [[2, 1, 0], [1, 5, 0]], [[0, 0, 3], [0, 0, 3]]]
    assert moved(units(*case, True), active, 0.25, "rigl") == {(0, 0), (0, 2), (1, 0), (1, 1)}
    case[2] = [[0, 0, 3], [0, 0, 4]]
    assert moved(units(*case, True), active, 0.25, "rigl") == {(0, 0), (1, 0), (1, 1), (1, 2)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("whole_model", [False, True])
def test_non_finite_scores_are_refused(bad, whole_model):
    for case in (
        [[[True, True, False]], [[bad, 1.0, 0.0]], [[0.0, 0.0, 1.0]]],
        [[[True, True, False]], [[2.0, 1.0, 0.0]], [[0.0, 0.0, bad]]],
    ):
        with pytest.raises(ValueError, match="not finite"):
            drop_and_grow(sharded(*case, whole_model), set_of(case[0]), 0.5, "largest gradient")


def test_static_has_no_update():
    case = [[[True, False]], [[1, 0]], [[0, 1]]]
    static = METHODS["static"](UpdateSchedule(1, 10))
    assert not any(map(static.is_update, range(20)))
    with pytest.raises(TypeError, match="static"):
        static.update(blocks(*case, False), Sets(set_of(case[0])), [1], 1)
    assert [METHODS[name].growth for name in ("static", "set", "rigl")] == [
        "none",
        "random",
        "gradient",
    ]
