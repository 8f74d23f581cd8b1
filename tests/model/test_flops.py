"""The ledger against Table 17, SPDF's ratio and the Pile recipe: FACTS sections 3 and 4."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.model.flops import (
    FlopsLedger,
    active_counts,
    dense_gradient_extra,
    fraction_of_steps,
    linear_shapes,
    mfu,
    peak_flops,
    sequence_flops,
    steps_for_tokens,
)
from sparse_gpt.model.presets import preset

VOCAB = 50257
SEQUENCES = 2_283_520  # 4460 steps of 512


def table_17(name: str, sparsity: float, seq_len: int = 1024) -> int:
    dims = preset(name)
    return sequence_flops(dims, seq_len, VOCAB, active_counts(dims, sparsity)).total


@pytest.mark.parametrize(
    ("name", "sparsity", "flops"),
    [
        ("gpt3-small", 0.0, 876_303_876_096),
        ("gpt3-small-sw50", 0.5, 1_029_007_761_408),
        ("gpt3-medium", 0.0, 2_484_477_100_032),
        ("gpt3-small-sw75", 0.75, 1_229_410_271_232),
    ],
)
def test_table_17(name, sparsity, flops):
    assert table_17(name, sparsity) == flops


def test_total_over_the_run():
    assert SEQUENCES == 4460 * 512
    ledger = FlopsLedger.of(preset("gpt3-small"), 1024, VOCAB)
    assert sum(512 * ledger.sequence(0, 0) for _ in range(4460)) == 876_303_876_096 * SEQUENCES


def test_spdf_ratio():
    ratio = Fraction(table_17("gpt3-xl", 0.75, 2048), table_17("gpt3-xl", 0.0, 2048))
    assert f"{float(ratio):.4f}" == "0.4014"


def test_where_the_excess_over_dense_comes_from():
    """FACTS section 3: about 65 % LM head, 32 % attention scores, 3 % rounding."""
    dense = sequence_flops(preset("gpt3-small"), 1024, VOCAB)
    dims = preset("gpt3-small-sw50")
    wide = sequence_flops(dims, 1024, VOCAB, active_counts(dims, 0.5))
    excess = wide.forward - dense.forward
    shares = [wide.head - dense.head, wide.scores - dense.scores]
    shares.append(wide.qkvo + wide.mlp - dense.qkvo - dense.mlp)
    assert sum(shares) == excess
    percent = [100 * share / excess for share in shares]
    assert percent == pytest.approx([65.52, 32.04, 2.45], abs=0.005)
    assert wide.softmax == dense.softmax


def test_the_formula_part_by_part():
    dims = {"n_layer": 3, "n_head": 2, "d_model": 8, "d_ff": 20}
    flops = sequence_flops(dims, 5, 11)
    assert flops.qkvo == 3 * 8 * 5 * 8**2
    assert flops.mlp == 3 * 4 * 5 * 8 * 20
    assert flops.scores == 3 * 4 * 5**2 * 8
    assert flops.softmax == 3 * 3 * 2 * 5**2
    assert flops.head == 2 * 5 * 8 * 11
    assert flops.backward == 2 * flops.forward
    assert flops.total == 3 * flops.forward


def test_the_projections_of_a_narrower_embedding():
    dims = {"n_layer": 3, "n_head": 2, "d_model": 8, "d_ff": 20}
    plain, projected = (sequence_flops(d, 5, 11) for d in (dims, {**dims, "d_embed": 6}))
    assert projected.head == 2 * 5 * 6 * 11
    assert projected.projections == 2 * 5 * 6 * 8 + 2 * 5 * 8 * 6
    assert plain.projections == 0
    without = plain.forward - plain.head
    assert projected.forward - without == projected.head + projected.projections


def test_pile_recipe():
    batch, seq_len = 256, 2048
    assert steps_for_tokens(2_500_000_000, batch, seq_len) == 4_769
    assert steps_for_tokens(2_505_048_064, batch, seq_len) == 4_778
    assert 4_778 * batch * seq_len == 2_505_048_064
    assert steps_for_tokens(375_000_000, batch, seq_len) == 716
    assert fraction_of_steps(0.75, 4_778) == 3_584


def test_fraction_of_steps_is_decimal():
    assert fraction_of_steps(0.07, 100) == 7
    assert fraction_of_steps(0.07, 101) == 8
    assert fraction_of_steps(1.0, 10) == 10


def test_layers_left_out_are_dense():
    dims = preset("gpt3-small")
    counts = active_counts(dims, 0.5)
    only_mlp = {name: count for name, count in counts.items() if ".mlp." in name}
    dense, part = sequence_flops(dims, 64, 100), sequence_flops(dims, 64, 100, only_mlp)
    assert part.qkvo == dense.qkvo
    assert part.mlp * 2 == dense.mlp


@pytest.mark.parametrize(
    ("name", "count"),
    [("h.12.attn.q.weight", 1), ("wte.weight", 1), ("h.0.attn.q.weight", 768**2 + 1)],
)
def test_an_impossible_count_is_refused(name, count):
    with pytest.raises(ValueError, match=name):
        sequence_flops(preset("gpt3-small"), 64, 100, {name: count})


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sparsity=st.integers(0, 99),
)
def test_counts_are_whole_blocks_nearest_to_the_sparsity(rows, cols, block, sparsity):
    dims = {
        "n_layer": 1,
        "n_head": 1,
        "d_model": rows * block[0] * block[1],
        "d_ff": cols * block[0] * block[1],
    }
    size = block[0] * block[1]
    counts = active_counts(dims, sparsity / 100, block)
    for name, (out, inner) in linear_shapes(dims).items():
        assert counts[name] % size == 0
        exact = Fraction(100 - sparsity, 100) * out * inner
        assert abs(counts[name] - exact) <= Fraction(size, 2) or counts[name] == size


def test_dense_gradient_step():
    dims = preset("gpt3-small-sw75")
    counts = active_counts(dims, 0.75)
    extra = dense_gradient_extra(dims, 1024, counts)
    d, f = 1536, 6144
    assert extra == 2 * 1024 * 12 * (4 * d * d + 2 * d * f) * 3 // 4
    ledger = FlopsLedger.of(dims, 1024, VOCAB, counts)
    active, everything = sum(counts.values()), ledger.sparse
    sparse = ledger.sequence(active, active)
    assert sparse == ledger.active.total == 1_229_410_271_232
    assert ledger.sequence(active, everything) - sparse == extra == ledger.dense_gradient
    # The dense step also computes forward and dX in full: three products in place of one.
    assert ledger.sequence(everything, everything) - sparse == 3 * extra
    assert ledger.sequence(everything, everything) == ledger.dense.total


def test_a_dense_model_has_no_extra():
    assert FlopsLedger.of(preset("gpt3-small"), 1024, VOCAB).dense_gradient == 0


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA L40S", "bf16", 362.05),
    ],
)
def test_peaks(device, precision, tflops):
    assert peak_flops(device, precision) == tflops * 1e12


@pytest.mark.parametrize("device", ["AMD EPYC", "NVIDIA A1000", "NVIDIA L400", ""])
def test_an_unknown_device_has_no_peak(device):
    assert peak_flops(device, "bf16") is None


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="fp8"):
        peak_flops("NVIDIA H200", "fp8")


def test_mfu():
    assert mfu(1e9, 1e5, 1e15) == pytest.approx(0.1)
    assert mfu(1e9, 1e5, None) is None
