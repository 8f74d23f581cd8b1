"""Shares of a total: exact sums, caps with redistribution, Erdos-Renyi's proportions."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.errors import UserError
from sparse_gpt.ift.distribution import apportion, distribute

SHAPES = {"q": (8, 8), "fc1": (32, 8), "fc2": (8, 32)}
LAYERS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=8)


@given(layers=LAYERS, data=st.data(), rule=st.sampled_from(["uniform", "erdos_renyi"]))
def test_the_total_is_exact(layers, data, rule):
    shapes = {str(i): shape for i, shape in enumerate(layers)}
    units = {name: out * inner for name, (out, inner) in shapes.items()}
    total = data.draw(st.integers(len(units), sum(units.values())))
    counts = distribute(shapes, total, rule=rule)
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= units[name] for name in units)


@given(layers=LAYERS, data=st.data())
def test_a_share_is_the_clamped_proportion_to_less_than_a_unit(layers, data):
    """There is an x with every count within one of clamp(x w, 1, cap)."""
    weights = {str(i): a for i, (a, _) in enumerate(layers)}
    caps = {str(i): b for i, (_, b) in enumerate(layers)}
    total = data.draw(st.integers(len(caps), sum(caps.values())))
    counts = apportion(weights, caps, total)
    low, high = Fraction(0), Fraction(max(caps.values()) + 1)
    for name, count in counts.items():
        if count > 1:  # x w > count - 1
            low = max(low, Fraction(count - 1, weights[name]))
        if count < caps[name]:  # x w < count + 1
            high = min(high, Fraction(count + 1, weights[name]))
    assert low < high


def test_uniform_by_hand():
    # 64 + 256 + 256 of 576; 100 are 11.11 and twice 44.44: the first of the largest remainders.
    assert distribute(SHAPES, 100) == {"q": 11, "fc1": 45, "fc2": 44}
    assert distribute(SHAPES, 144) == {"q": 16, "fc1": 64, "fc2": 64}


def test_erdos_renyi_by_hand():
    # In proportion to 16, 40, 40.
    assert distribute(SHAPES, 96, rule="erdos_renyi") == {"q": 16, "fc1": 40, "fc2": 40}
    # 360 would be 60, 150, 150; at 480 q is full at 64, and 416 are left for two.
    assert distribute(SHAPES, 360, rule="erdos_renyi") == {"q": 60, "fc1": 150, "fc2": 150}
    assert distribute(SHAPES, 480, rule="erdos_renyi") == {"q": 64, "fc1": 208, "fc2": 208}


def test_erdos_renyi_kernel_by_hand():
    # 4 + 4 + 3 + 3 and 2 + 4 + 1 + 1 of 144 and 8 weights.
    shapes = {"conv": (4, 4, 3, 3), "point": (2, 4, 1, 1)}
    assert distribute(shapes, 11, rule="erdos_renyi") == {"conv": 7, "point": 4}
    assert distribute(shapes, 100, rule="erdos_renyi") == {"conv": 92, "point": 8}


def test_blocks_are_the_units():
    assert distribute(SHAPES, 36, (4, 4)) == {"q": 4, "fc1": 16, "fc2": 16}
    assert distribute(SHAPES, 12, (4, 4), "erdos_renyi") == {"q": 2, "fc1": 5, "fc2": 5}


def test_fixed_layers_are_made_up_for():
    counts = distribute(SHAPES, 144, fixed={"q": 64})
    assert counts == {"q": 64, "fc1": 40, "fc2": 40}


@pytest.mark.parametrize("total", [65, 577])
def test_what_the_others_cannot_make_up_for_is_refused(total):
    with pytest.raises(UserError, match=r"1 fixed ones \(dense_first.* remain for 2 layers"):
        distribute(SHAPES, total, fixed={"q": 64})


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="magic"):
        distribute(SHAPES, 100, rule="magic")
    with pytest.raises(ValueError, match="3 units do not fit 1 layers"):
        apportion({"a": 1}, {"a": 2}, 3)
