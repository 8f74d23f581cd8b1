"""Static, SET and RigL step by step, by their papers' algorithms in plain Python."""

import math

import pytest

from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from tests.topology.methods.toy import BLOCK, SINGLE, Driven, Plain, totals

STEPS, FREQ, STOP, INIT = 24, 3, 20, 0.5
LAYOUTS = [(SINGLE, False), (SINGLE, True), (BLOCK, False), (BLOCK, True)]


def some(block):
    """A quarter of the weights, or half of the few blocks."""
    return {name: count // (4 if block == SINGLE else 2) for name, count in totals(block).items()}


@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
def test_static(block, whole_model):
    targets = some(block)
    driven = Driven(METHODS["static"](UpdateSchedule(FREQ, STOP)), targets, block, whole_model)
    plain = Plain(block)
    plain.random_start(targets)
    for step in range(1, STEPS + 1):
        assert driven.step(step) is None
        plain.optimize(step, plain.active)
        plain.check(driven)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_drop_and_grow(method, block, whole_model, replace):
    targets = some(block)
    schedule = UpdateSchedule(FREQ, STOP, init=INIT)
    driven = Driven(METHODS[method](schedule), targets, block, whole_model, replace)
    plain = Plain(block, whole_model)
    plain.random_start(targets)
    moved = 0
    for step in range(1, STEPS + 1):
        report = driven.step(step)
        update = step % FREQ == 0 and step < STOP
        assert (report is not None) == update
        dense = update and method == "rigl"
        assert all(layer.dense_grad == dense for layer in driven.layers.values())
        if not (update and replace):
            plain.optimize(step, plain.active)
        if update:
            fraction = INIT / 2 * (1 + math.cos(math.pi * step / STOP))
            kept, many = plain.drop_each(plain.active, fraction, plain.magnitude)
            score = plain.growth(step) if method == "rigl" else plain.chance(step // FREQ)
            new = plain.grow_each(kept, many, score)
            assert report.replaced == len(new - plain.active)
            assert report.dropped == sum(many.values())
            moved += report.replaced
            plain.move(new)
        plain.check(driven)
        assert len(plain.active) == sum(targets.values())
    assert moved > 3
