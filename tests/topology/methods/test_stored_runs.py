"""Methods that keep what does not take part: Top-KAST, and Algorithm 1 of "Search spaces"."""

from fractions import Fraction

import pytest

from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule
from tests.topology.methods.toy import BLOCK, SINGLE, Driven, Plain, f32, totals

STEPS = 24
LAYOUTS = [(SINGLE, False), (SINGLE, True), (BLOCK, False)]


def share(block, of):
    return {name: round(Fraction(of) * count) for name, count in totals(block).items()}


@pytest.mark.parametrize("broken", [set(), {4, 8}], ids=str)
@pytest.mark.parametrize("freq", [1, 4])
@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
@pytest.mark.parametrize("backward_sparsity", [0.0, 0.5])
def test_top_kast(backward_sparsity, block, whole_model, freq, broken):
    """Jayakumar et al. (2020): A = TopK(w, D), B = TopK(w, D + M); L2 on A, and 1/D of it on B."""
    strength, stop = 1 / 8, 21
    targets, wider = share(block, 0.25), share(block, 1 - backward_sparsity)
    method = METHODS["top_kast"](
        UpdateSchedule(freq, stop), backward_sparsity=backward_sparsity, regulariser=strength
    )
    driven = Driven(method, targets, block, whole_model)
    plain = Plain(block, whole_model)

    def chosen():
        a = plain.top_each(plain.everything, targets, plain.magnitude)
        return a, plain.top_each(plain.everything, wider, plain.magnitude)

    plain.active, trained = chosen()
    plain.check(driven, trained)
    entered = 0
    for step in range(1, STEPS + 1):
        report = driven.step(step, broken=step in broken)
        update = step % freq == 0 and step < stop and step not in broken
        assert (report is not None) == update
        assert all(layer.dense_grad for layer in driven.layers.values())
        if step in broken:
            plain.check(driven, trained)
            continue
        density = {n: targets[n] / count for n, count in totals(block).items()}
        if whole_model:
            density = dict.fromkeys(density, sum(targets.values()) / len(plain.everything))

        def regulariser(unit, i, w=plain.w, active=plain.active, density=density):
            if unit in active:
                return f32(strength * w[unit[0]][i])
            return f32(f32(strength / density[unit[0]]) * w[unit[0]][i])

        plain.optimize(step, trained, regulariser)
        if update:
            before, trained_before = plain.active, trained
            plain.active, trained = chosen()
            assert report.replaced == len(plain.active - before)
            entered += len(trained - trained_before)
            plain.clear(plain.everything - trained, "mv")  # outside B nothing is left to move by
        assert plain.active <= trained
        plain.check(driven, trained)
    assert entered > 0 or backward_sparsity == 0


@pytest.mark.parametrize("freq", [1, 3])
@pytest.mark.parametrize(("block", "whole_model"), LAYOUTS)
@pytest.mark.parametrize("exploit", ["fix", "reset", "regularize"])
def test_search_spaces(exploit, block, whole_model, freq):
    """Paper 002, Algorithm 1, a line of it a line here; freq 3 does lines 4 and 5 every 3 steps."""
    targets, v, z, beta = share(block, 0.25), 13, 8, 1 / 64
    method = METHODS["search_spaces"](
        UpdateSchedule(freq, STEPS + 1), exploit=exploit, v=v, z=z, beta=beta
    )
    driven = Driven(method, targets, block, whole_model)
    plain = Plain(block, whole_model)
    changed = 0
    for t in range(1, STEPS + 1):
        if (t - 1) % freq == 0 and not (exploit == "fix" and t > v):
            before = plain.active
            plain.active = plain.top_each(plain.everything, targets, plain.magnitude)  # 4, 5
            changed += bool(before) and before != plain.active
        assert driven.forward == plain.active, "what step t computes its loss with"
        fixed = exploit == "fix" and t > v
        driven.step(t)
        assert all(layer.dense_grad == (not fixed) for layer in driven.layers.values())
        plain.optimize(t, plain.active if fixed else plain.everything)  # 6, 7, 8
        out = plain.everything - plain.active
        if exploit == "fix" and t >= v:
            plain.clear(out)  # 9; what is 0 for good has no moments either
        if exploit == "reset" and t % z == 0:
            plain.clear(out, "w")  # 10
        if exploit == "regularize":
            for unit in out:
                for i in plain.elements(unit):
                    plain.w[unit[0]][i] = f32(plain.w[unit[0]][i] * (1 - beta))  # 11
        for kind, mine in (("master", plain.w), ("exp_avg", plain.m), ("exp_avg_sq", plain.v)):
            assert driven.values(kind) == mine, (t, kind)
    assert changed > 1


def test_reset_every_step_never_rewires():
    """Paper 002, section 3.2: z = 1 "is equivalent when training without any rewiring"."""
    method = METHODS["search_spaces"](UpdateSchedule(1, STEPS + 1), exploit="reset", z=1)
    driven = Driven(method, share(SINGLE, 0.25))
    first = driven.forward
    for step in range(1, STEPS + 1):
        driven.step(step)
        values = driven.values("master")
        alive = {u for u in first if values[u[0]][u[1]]}
        assert alive <= driven.forward


@pytest.mark.parametrize("broken", [{13}, {12, 13, 14}], ids=str)
def test_fix_is_made_up_for(broken):
    """A step v that is not finite changes nothing; the next finite one makes the rest 0."""
    method = METHODS["search_spaces"](UpdateSchedule(1, STEPS + 1), exploit="fix", v=13)
    driven = Driven(method, share(SINGLE, 0.25))
    for step in range(1, STEPS + 1):
        before = (driven.forward, driven.values("master"), driven.values("exp_avg"))
        driven.step(step, broken=step in broken)
        after = (driven.forward, driven.values("master"), driven.values("exp_avg"))
        if step in broken:
            assert after == before
        elif step >= 13:
            for name, values in after[1].items():
                inside = {i for layer, i in after[0] if layer == name}
                assert not any(x for i, x in enumerate(values) if i not in inside)
                assert not any(x for i, x in enumerate(after[2][name]) if i not in inside)
