"""Block counts re-solved to the base layer's FLOPs, and the residual: FACTS section 8."""

from fractions import Fraction

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.ift.iso_flop import residual, solve_units
from sparse_gpt.ift.wide import widen
from sparse_gpt.model.flops import active_counts, linear_shapes, sequence_flops

SMALL = {"n_layer": 12, "n_head": 12, "d_model": 768, "d_ff": 3072}


def test_blocks_that_divide_the_base_layer_leave_no_residual():
    wide = widen(SMALL, 0.5, multiple_of=16)
    units = solve_units(SMALL, wide, (16, 16))
    assert units["h.0.attn.q.weight"] == 768 * 768 // 256
    assert units["h.11.mlp.fc2.weight"] == 768 * 3072 // 256
    report = residual(SMALL, wide, {name: 256 * count for name, count in units.items()})
    assert report["all"].excess == 0


def test_each_count_is_the_nearest():
    wide = widen(SMALL, 0.9, heads="fixed_d_head")
    units = solve_units(SMALL, wide, (64, 32))
    for name, (out, inner) in linear_shapes(SMALL).items():
        assert 2 * abs(units[name] * 64 * 32 - out * inner) <= 64 * 32


def test_a_tie_takes_the_smaller_count():
    tiny = {"n_layer": 1, "n_head": 1, "d_model": 3, "d_ff": 4}
    wide = {**tiny, "d_model": 4, "d_ff": 6}
    units = solve_units(tiny, wide, (2, 1))
    assert units["h.0.attn.q.weight"] == 4  # 9 / 2
    assert units["h.0.mlp.fc1.weight"] == 6


def test_residual_of_the_published_widths():
    wide = widen(SMALL, 0.5)
    counts = active_counts(wide, 0.5)
    report = residual(SMALL, wide, counts)
    assert report["attn.q"].excess == Fraction(1092**2, 2 * 768**2) - 1
    assert report["mlp.fc1"].excess == Fraction(1092 * 4344, 2 * 768 * 3072) - 1
    dense, sparse = sequence_flops(SMALL, 64, 9), sequence_flops(wide, 64, 9, counts)
    ratio = Fraction(sparse.qkvo + sparse.mlp, dense.qkvo + dense.mlp)
    assert report["all"].excess == ratio - 1
    assert set(report) == {f"attn.{k}" for k in "qkvo"} | {"mlp.fc1", "mlp.fc2", "all"}
    assert float(report["attn.q"].excess) == pytest.approx(0.01086, abs=5e-6)
    assert float(report["all"].excess) == pytest.approx(0.00716, abs=5e-6)


def test_a_block_that_divides_no_layer_is_refused():
    with pytest.raises(UserError, match=r"structure.block: 16 x 16 does not divide h.0.attn.q"):
        solve_units(SMALL, widen(SMALL, 0.5), (16, 16))


def test_a_narrower_model_is_refused():
    with pytest.raises(UserError, match=r"h.0.attn.q.weight \(384 x 384\) is smaller"):
        solve_units(SMALL, {**SMALL, "d_model": 384})


def test_another_depth_is_refused():
    with pytest.raises(UserError, match=r"model\.n_layer: h\.12\.attn"):
        solve_units(SMALL, {**SMALL, "n_layer": 13})
