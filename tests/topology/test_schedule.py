"""When topologies change and by how much: the authors' schedule at its ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology.schedule import UpdateSchedule

AUTHORS = UpdateSchedule(freq=100, stop=3584)  # of 4,778 steps; FACTS section 4


def test_the_authors_steps():
    updates = [step for step in range(1, 4779) if AUTHORS.is_update(step)]
    assert updates == list(range(100, 3501, 100))
    assert [AUTHORS.update_index(step) for step in updates] == list(range(1, 36))


def test_drop_fraction_at_the_ends():
    assert AUTHORS.drop_fraction(0) == 0.3
    assert AUTHORS.drop_fraction(1792) == pytest.approx(0.15)
    assert AUTHORS.drop_fraction(3584) == 0.0
    assert AUTHORS.drop_fraction(4000) == 0.0  # does not rise again


def test_half_period_apart_from_stop():
    schedule = UpdateSchedule(freq=10, stop=100, init=0.5, half_period=200)
    assert schedule.drop_fraction(100) == pytest.approx(0.25)
    assert schedule.drop_fraction(200) == 0.0


def test_constant():
    schedule = UpdateSchedule(freq=10, stop=100, init=0.2, kind="constant")
    assert {schedule.drop_fraction(step) for step in range(0, 200, 7)} == {0.2}


@given(st.integers(1, 50), st.integers(1, 500), st.floats(0, 1), st.integers(0, 600))
def test_bounds(freq, stop, init, step):
    schedule = UpdateSchedule(freq, stop, init)
    fraction = schedule.drop_fraction(step)
    assert 0 <= fraction <= init
    assert fraction >= schedule.drop_fraction(step + 1)
    wanted = init / 2 * (1 + math.cos(math.pi * min(1, step / stop)))
    assert fraction == pytest.approx(wanted, abs=1e-12)
    assert schedule.is_update(step) == (step in range(freq, stop, freq))
