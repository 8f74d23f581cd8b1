"""Sparse Wide widths: FACTS sections 2 and 8."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.errors import UserError
from sparse_gpt.ift import MEMBERS
from sparse_gpt.ift.wide import widen

SMALL = {"n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072}


@pytest.mark.parametrize(
    ("sparsity", "d_model", "d_ff"),
    [(0.5, 1092, 4344), (0.75, 1536, 6144), (0.9, 2424, 9720)],
)
def test_published_widths(sparsity, d_model, d_ff):
    wide = widen(SMALL, sparsity)
    assert wide == {"n_layer": 12, "n_head": 12, "d_model": d_model, "d_ff": d_ff}


@pytest.mark.parametrize(("sparsity", "d_model", "n_head"), [(0.5, 1088, 17), (0.9, 2432, 38)])
def test_fixed_head_width(sparsity, d_model, n_head):
    wide = widen(SMALL, sparsity, heads="fixed_d_head", multiple_of=16)
    assert (wide["d_model"], wide["n_head"]) == (d_model, n_head)
    assert wide["d_model"] // wide["n_head"] == 64
    assert wide["d_ff"] % 64 == 0


def test_fixed_head_width_is_the_base_models():
    wide = widen({"n_layer": 1, "n_head": 16, "d_model": 2048, "d_ff": 8192}, 0.75, "fixed_d_head")
    assert wide == {"n_layer": 1, "n_head": 32, "d_model": 4096, "d_ff": 16384}


@pytest.mark.parametrize(("sparsity", "d_model"), [(0.5, 1104), (0.9, 2448)])
def test_widths_for_blocks_of_16(sparsity, d_model):
    wide = widen(SMALL, sparsity, multiple_of=16)
    assert wide["d_model"] == d_model
    assert wide["n_head"] == 12
    assert wide["d_model"] % 48 == wide["d_ff"] % 48 == 0


@pytest.mark.parametrize("heads", ["keep", "fixed_d_head"])
def test_no_sparsity_is_the_base_model(heads):
    dims = {"n_layer": 2, "n_head": 3, "d_model": 51, "d_ff": 100}
    assert widen(dims, 0.0, heads=heads, multiple_of=16) == dims


@given(
    n_head=st.integers(1, 40),
    d_head=st.integers(1, 128),
    d_ff=st.integers(1, 50_000),
    percent=st.integers(1, 99),
    heads=st.sampled_from(["keep", "fixed_d_head"]),
    multiple_of=st.sampled_from([None, 1, 8, 16, 24]),
)
def test_each_width_is_the_nearest_multiple(n_head, d_head, d_ff, percent, heads, multiple_of):
    dims = {"n_layer": 1, "n_head": n_head, "d_model": n_head * d_head, "d_ff": d_ff}
    wide = widen(dims, percent / 100, heads, multiple_of)
    step = math.lcm(n_head if heads == "keep" else d_head, multiple_of or 1)
    for key in ("d_model", "d_ff"):
        assert wide[key] % step == 0
        assert wide[key] >= step
        # Exactly, by squares: |wide - k d| <= step / 2, with k^2 = 1 / (1 - s).
        target = Fraction(dims[key]) ** 2 / Fraction(100 - percent, 100)
        assert target <= (wide[key] + Fraction(step, 2)) ** 2
        if wide[key] > step:
            assert target >= (wide[key] - Fraction(step, 2)) ** 2
    assert wide["d_model"] % wide["n_head"] == 0


def test_a_sparsity_is_read_as_its_decimal():
    # 1 - 0.9 in doubles is less than 1/10; the width would be a hair above sqrt(10) d.
    assert widen({**SMALL, "d_model": 12, "n_head": 1}, 0.99)["d_model"] == 120
    assert Fraction(Decimal("0.99")) != Fraction(0.99)


def test_the_table_of_members():
    assert MEMBERS["wide"] is widen
    assert MEMBERS["none"](SMALL, 0.75, heads="keep", multiple_of=16) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "ift.sparsity: 1.0"),
        ({"sparsity": -0.1}, "ift.sparsity: -0.1"),
        ({"heads": "free"}, "ift.heads: 'free'"),
        ({"multiple_of": 0}, "ift.multiple_of: 0"),
        ({"dims": {**SMALL, "n_head": 7}}, "768 is not divisible by model.n_head 7"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(UserError, match=message):
        widen(**{"dims": SMALL, "sparsity": 0.5, **change})
