"""Drop and grow, as SET and RigL share it, against an independent oracle in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology.methods import METHODS
from sparse_gpt.topology.methods.drop_grow import drop_and_grow

TIED = st.sampled_from([0.0, 0.25, 0.5, 0.5000001, 1.0])


@st.composite
def cases(draw):
    """(active, magnitude, growth, count): inactive weights are 0, growth is of either kind."""
    n = draw(st.integers(1, 24))
    active = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    magnitude = draw(st.lists(TIED | st.floats(0, 4, width=32), min_size=n, max_size=n))
    magnitude = [m if a else 0.0 for m, a in zip(magnitude, active)]
    elements = draw(st.sampled_from([TIED, st.integers(0, 2**62 - 1), st.integers(0, 3)]))
    growth = draw(st.lists(elements, min_size=n, max_size=n))
    return active, magnitude, growth, draw(st.integers(0, sum(active)))


def oracle(active, magnitude, growth, count):
    """One removal and one insertion at a time, by repeated minimum and maximum."""
    kept = {i for i, a in enumerate(active) if a}
    for _ in range(count):
        kept.remove(min(kept, key=lambda i: (magnitude[i], i)))
    new = set(kept)
    for _ in range(count):
        new.add(max(set(range(len(active))) - new, key=lambda i: (growth[i], -i)))
    return new


def as_tensors(active, magnitude, growth):
    kind = torch.int64 if all(isinstance(g, int) for g in growth) else torch.float32
    return (
        torch.tensor(active),
        torch.tensor(magnitude, dtype=torch.float32),
        torch.tensor(growth, dtype=kind),
    )


@settings(max_examples=300)
@given(cases())
def test_against_the_oracle(case):
    active, magnitude, growth, count = case
    a, m, g = as_tensors(active, magnitude, growth)
    exact = [float(value) if g.is_floating_point() else int(value) for value in g]
    new = drop_and_grow(a, m, g, count)
    assert set(new.nonzero().flatten().tolist()) == oracle(active, m.tolist(), exact, count)
    assert int(new.sum()) == sum(active), "the number of active units is conserved"
    assert torch.equal(a, torch.tensor(active)), "the old mask is left alone"
    assert int((new & ~a).sum()) <= count
    for name in ("set", "rigl"):
        assert torch.equal(METHODS[name].update(a, m, g, count), new)


def test_a_dropped_unit_may_come_back():
    active = torch.tensor([True, True, False])
    new = drop_and_grow(active, torch.tensor([0.1, 0.9, 0.0]), torch.tensor([5.0, 9.0, 4.0]), 1)
    assert torch.equal(new, active)


def test_dropping_none_or_all():
    active = torch.tensor([[True, False], [True, False]])
    magnitude, growth = torch.rand(2, 2), torch.tensor([[0.0, 1.0], [0.5, 2.0]])
    same = drop_and_grow(active, magnitude, growth, 0)
    assert torch.equal(same, active)
    assert same.data_ptr() != active.data_ptr()
    new = drop_and_grow(active, magnitude, growth, 2)
    assert new.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_scores_are_refused(bad):
    active, good = torch.tensor([True, False]), torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="magnitudes are not finite"):
        drop_and_grow(active, torch.tensor([bad, 0.0]), good, 1)
    with pytest.raises(ValueError, match="growth scores are not finite"):
        drop_and_grow(active, good, torch.tensor([0.0, bad]), 1)


@pytest.mark.parametrize("count", [-1, 2])
def test_a_count_that_cannot_be_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot drop {count} of 1"):
        drop_and_grow(torch.tensor([True, False]), torch.ones(2), torch.ones(2), count)


def test_static_has_no_update():
    assert not METHODS["static"].dynamic
    with pytest.raises(TypeError, match="static"):
        METHODS["static"].update(torch.ones(1), torch.ones(1), torch.ones(1), 0)
