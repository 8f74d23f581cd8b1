"""GMP, GraNet and AC/DC step by step, by their papers' algorithms in plain Python."""

import math
from fractions import Fraction

import pytest

from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from tests.topology.methods.toy import BLOCK, SINGLE, Driven, Plain, totals

STEPS, FREQ, STOP, INIT = 24, 3, 20, 0.5
LAYOUTS = [(SINGLE, False), (SINGLE, True), (BLOCK, False)]
BROKEN = [set(), {9, 10}, {15, 18, 19}]  # non-finite steps: at an update; at the last ones


def eighth(block):
    return {name: max(1, count // 8) for name, count in totals(block).items()}


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def on_the_cubic(step, first, last, end):
    """Zhu & Gupta (2017), eq. 1, in units that are left: s_f + (s_i - s_f)(1 - t/T)^3."""
    return last + half_up((first - last) * (1 - Fraction(min(step, end), end)) ** 3)


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
@pytest.mark.parametrize(("method", "initial"), [("gmp", 0.0), ("granet", 0.5)])
def test_gmp_and_granet(method, initial, block, whole_model, broken):
    targets, all_units = eighth(block), totals(block)
    first = {name: round((1 - Fraction(initial)) * count) for name, count in all_units.items()}
    schedule = UpdateSchedule(FREQ, STOP, init=INIT)
    driven = Driven(
        METHODS[method](schedule, initial_sparsity=initial), targets, block, whole_model
    )
    plain = Plain(block, whole_model)
    plain.random_start(first)
    plain.check(driven)
    end, owed, made_up = 18, False, 0  # the last multiple of 3 below 20
    for step in range(1, STEPS + 1):
        report = driven.step(step, broken=step in broken)
        if step in broken:
            assert report is None
            plain.check(driven)
            owed = True
            continue
        at = min(step, end) // FREQ * FREQ
        counts = {n: on_the_cubic(at, first[n], targets[n], end) for n in targets}
        owed = owed and len(plain.active) != sum(counts.values())
        due = owed or (step % FREQ == 0 and step < STOP)
        assert (report is not None) == due
        dense = due and method == "granet"
        assert all(layer.dense_grad == dense for layer in driven.layers.values())
        plain.optimize(step, plain.active)
        made_up += owed
        if due:
            new = plain.top_each(plain.active, counts, plain.magnitude)
            if method == "granet":
                fraction = INIT / 2 * (1 + math.cos(math.pi * min(step, STOP) / STOP))
                kept, many = plain.drop_each(new, fraction, plain.magnitude)
                new = plain.grow_each(kept, many, plain.growth(step))
            else:
                assert new <= plain.active
            assert report.active == len(new)
            plain.move(new)
        owed = False
        plain.check(driven)
    assert made_up == bool(broken) or block == BLOCK
    assert len(plain.active) == sum(targets.values())
    if not whole_model:
        assert {n: driven.controller.masks[n].active for n in targets} == targets


def phases_of(steps, warmup, phase, last_dense, last_sparse):
    """Where AC/DC changes, for phases that fit: (steps dense, sparse, dense, ..., sparse)."""
    lengths, rest = [warmup], steps - warmup - last_dense - last_sparse
    assert rest % phase == 0
    assert rest // phase % 2 == 1, "a sparse phase comes before the last dense one"
    return [*lengths, *[phase] * (rest // phase), last_dense, last_sparse]


@pytest.mark.parametrize("broken", [set(), {3}, {6, 7}, {9, 10, 11, 21}], ids=str)
@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
@pytest.mark.parametrize(("dense_sparsity", "reset"), [(0.0, False), (0.5, True)])
def test_ac_dc(dense_sparsity, reset, block, whole_model, broken):
    """30 steps: 3 dense, 5 phases of 3, of them 3 sparse, 3 dense, and 9 sparse ones."""
    targets, all_units = eighth(block), totals(block)
    method = METHODS["ac_dc"](
        UpdateSchedule(100, 1),
        total_steps=30, warmup=0.1, phase=0.1, last_dense=0.1, last_sparse=0.3,
        dense_sparsity=dense_sparsity, reset_moments=reset,
    )  # fmt: skip
    lengths = phases_of(30, 3, 3, 3, 9)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    driven = Driven(method, targets, block, whole_model)
    plain = Plain(block, whole_model)
    plain.active = plain.everything  # without sparsity until the first compression
    plain.check(driven)
    owed = False
    dense = {n: round((1 - Fraction(dense_sparsity)) * count) for n, count in all_units.items()}
    for step in range(1, 31):
        report = driven.step(step, broken=step in broken)
        if step in broken:
            assert report is None
            plain.check(driven)
            owed = owed or step in ends
            continue
        sparse = sum(end <= step for end in ends) % 2 == 1
        wanted = sum((targets if sparse else dense if step >= ends[0] else all_units).values())
        due = (owed or step in ends) and (step in ends or wanted != len(plain.active))
        assert (report is not None) == due
        plain.optimize(step, plain.active)
        if due:
            if sparse:
                new = plain.top_each(plain.active, targets, plain.magnitude)
            else:
                there = {n: sum(u[0] == n for u in plain.active) for n in totals(block)}
                missing = {n: dense[n] - there[n] for n in there}
                score = plain.chance(step)
                new = plain.active | plain.top_each(plain.everything - plain.active, missing, score)
            plain.move(new)
            if reset:
                plain.clear(plain.everything, "mv")
        owed = False
        plain.check(driven)
    assert len(plain.active) == sum(targets.values())
