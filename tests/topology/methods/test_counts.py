"""How many units methods keep, as pure functions of the step: schedules and their end points."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.schedule import UpdateSchedule


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["gmp", "granet"]),
    st.integers(1, 10),  # freq
    st.integers(1, 20),  # updates
    st.integers(1, 10_000),  # units
    st.floats(0, 1),  # how much of them stays
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
)
def test_the_cubic(name, freq, updates, total, share, initial):
    """Zhu & Gupta (2017), eq. 1: s_t = s_f + (s_i - s_f)(1 - t / (n dT))^3, each dT steps."""
    target = max(1, round(share * total))
    method = METHODS[name](UpdateSchedule(freq, updates * freq + 1), initial_sparsity=initial)
    counts = [method.active_after(t, target, total) for t in range(freq * (updates + 2))]
    first = max(target, round((1 - Fraction(str(initial))) * total))
    assert counts[0] == first
    assert counts[freq * updates :] == [target] * (2 * freq)
    assert all(later <= earlier for earlier, later in pairwise(counts))
    for t, count in enumerate(counts[: freq * updates]):
        assert count == counts[t // freq * freq], "changes at updates only"
        s_i, s_f = 1 - Fraction(first, total), 1 - Fraction(target, total)
        s_t = s_f + (s_i - s_f) * (1 - Fraction(t // freq, updates)) ** 3
        assert abs(count - (1 - s_t) * total) <= Fraction(1, 2)
    changes = {t for t in range(1, len(counts)) if counts[t] != counts[t - 1]}
    assert changes <= {t for t in range(len(counts)) if method.is_update(t)}


def test_gmp_is_fixed_for_the_last_quarter():
    """Paper 003, appendix B: updates every 5 epochs of 100, none in the last quarter."""
    method = METHODS["gmp"](UpdateSchedule(5, 75))
    counts = [method.active_after(epoch, 5_000, 100_000) for epoch in range(101)]
    assert [epoch for epoch in range(101) if method.is_update(epoch)] == list(range(5, 75, 5))
    assert counts[0] == 100_000
    assert counts[69] > counts[70] == counts[100] == 5_000


def ac_dc(total_steps, **more):
    return METHODS["ac_dc"](UpdateSchedule(1, 1), total_steps=total_steps, **more)


@pytest.mark.parametrize("scale", [1, 7, 50])
def test_the_phases_of_ac_dc(scale):
    """100 epochs: dense 0-10, then 5 each in turn, dense 75-85, sparse 85-100."""
    method = ac_dc(100 * scale)
    wanted = ["dense"] * 10
    for epoch in range(10, 75, 5):
        wanted += ["sparse" if epoch % 10 == 0 else "dense"] * 5
    wanted += ["dense"] * 10 + ["sparse"] * 15
    seen = []
    for step in range(1, 100 * scale + 1):  # with what the step before left
        seen.append("sparse" if method.active_after(step - 1, 5, 100) == 5 else "dense")
    assert seen == [kind for kind in wanted for _ in range(scale)]
    updates = [step for step in range(100 * scale + 1) if method.is_update(step)]
    assert updates == [scale * epoch for epoch in (*range(10, 80, 5), 85)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(60, 1000),
    st.sampled_from([0.05, 0.1, 0.2]),
    st.sampled_from([0.03, 0.05, 0.1, 0.2]),
    st.sampled_from([0.05, 0.1, 0.2]),
    st.sampled_from([0.1, 0.15, 0.3]),
    st.sampled_from([0.0, 0.5, 0.8, 0.95]),
)
def test_ac_dc_in_general(steps, warmup, phase, last_dense, last_sparse, dense_sparsity):
    method = ac_dc(
        steps, warmup=warmup, phase=phase, last_dense=last_dense, last_sparse=last_sparse,
        dense_sparsity=dense_sparsity,
    )  # fmt: skip
    counts = [method.active_after(step, 20, 200) for step in range(steps + 1)]
    assert counts[0] == 200, "the warm-up is dense whatever the dense phases are"
    assert counts[-1] == 20
    begins = [0, *(step for step in range(1, steps + 1) if counts[step] != counts[step - 1])]
    dense = max(20, round((1 - Fraction(str(dense_sparsity))) * 200))
    if dense_sparsity < 0.9:
        kinds = [counts[step] for step in begins]
        assert kinds == [200, *[20, dense] * ((len(kinds) - 2) // 2), 20]
        lengths = [b - a for a, b in zip(begins, [*begins[1:], steps])]
        for length, share in ((lengths[0], warmup), (lengths[-1], last_sparse)):
            assert abs(length - share * steps) <= 1
        assert abs(lengths[-2] - last_dense * steps) <= 2
        middle = lengths[1:-2]
        assert max(middle) - min(middle) <= 1, "the phases between are as long as each other"
    assert set(begins[1:]) <= {step for step in range(steps + 1) if method.is_update(step)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([0.0, 0.3, 0.5, 0.99]))
def test_top_kast_trains_more_than_it_uses(target, more, backward):
    method = METHODS["top_kast"](UpdateSchedule(1, 9), backward_sparsity=backward)
    total = target + more
    wanted = max(target, round((1 - Fraction(str(backward))) * total))
    for step in range(12):
        assert method.active_after(step, target, total) == target
        assert method.trained_after(step, target, total) == wanted


def test_search_spaces_trains_everything_until_it_is_fixed():
    schedule = UpdateSchedule(1, 100)
    for exploit, last in (("fix", 49), ("reset", 99), ("regularize", 99)):
        method = METHODS["search_spaces"](schedule, exploit=exploit, v=50, z=10, beta=0.25)
        assert [t for t in range(101) if method.is_update(t)] == list(range(1, last + 1))
        trained = [method.trained_after(t, 3, 12) for t in range(100)]  # B of step t + 1
        assert trained == [3 if exploit == "fix" and t >= 50 else 12 for t in range(100)]
        factors = {t: method.outside_factor(t) for t in range(1, 101)}
        assert (
            factors
            == {
                "fix": {t: 0.0 if t >= 50 else None for t in factors},
                "reset": {t: 0.0 if t % 10 == 0 else None for t in factors},
                "regularize": dict.fromkeys(factors, 0.75),
            }[exploit]
        )
