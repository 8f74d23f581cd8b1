"""The members' forms: the paper's closed forms, and the dense layer's FLOPs (FACTS section 1)."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.ift import forms
from sparse_gpt.ift.forms import (
    LayerWeight,
    Transform,
    layer_weights,
    solve_size,
    solve_units,
    weight_std,
)
from sparse_gpt.model.flops import linear_weights, sequence_flops

SMALL = {"n_layer": 2, "n_head": 12, "d_model": 768, "d_ff": 3072}
SPARSE_FORMS = ("parallel", "factorized", "doped")

shapes = st.tuples(st.integers(8, 5000), st.integers(8, 5000))
sparsities = st.integers(0, 99).map(lambda percent: Fraction(percent, 100))


def dense_rank(shape: tuple[int, int]) -> Fraction:
    """D_in D_out / (D_in + D_out)."""
    return Fraction(shape[0] * shape[1], sum(shape))


@pytest.mark.parametrize(
    ("member", "sparsity", "shape", "size"),
    [
        ("parallel", 0.5, (768, 768), 2),
        ("parallel", 0.75, (768, 3072), 4),
        ("parallel", 0.9, (3072, 768), 10),
        ("factorized", 0.0, (768, 768), 384),
        ("factorized", 0.5, (768, 768), 768),
        ("factorized", 0.75, (3072, 768), 2458),  # 2457.6
        ("doped", 0.0, (768, 768), 0),
        ("doped", 0.75, (768, 768), 288),
        ("doped", 0.9, (3072, 768), 553),  # 552.96
        ("low_rank", 0.0, (768, 768), 384),
    ],
)
def test_sizes_by_hand(member, sparsity, shape, size):
    assert solve_size(member, sparsity, shape) == size


@given(shapes, sparsities)
def test_sizes_are_the_closed_forms_to_the_nearest_integer(shape, sparsity):
    half, rank = Fraction(1, 2), dense_rank(shape)
    assert abs(solve_size("parallel", sparsity, shape) - 1 / (1 - sparsity)) <= half
    assert abs(solve_size("factorized", sparsity, shape) - rank / (1 - sparsity)) <= half
    assert abs(solve_size("doped", sparsity, shape) - rank * sparsity) <= half
    assert abs(solve_size("low_rank", 0, shape) - rank) <= half


@given(shapes, st.integers(100, 400).map(lambda n: Fraction(n, 100)))
def test_a_low_rank_layer_costs_the_base_layer_at_every_width(base, k_lr):
    wide = (round(k_lr * base[0]), round(k_lr * base[1]))
    rank = solve_size("low_rank", 0, wide, base)
    macs = sum(w.numel for w in layer_weights("low_rank", rank, wide).values())
    assert macs == rank * sum(wide)
    if rank > 1:
        assert abs(macs - base[0] * base[1]) <= Fraction(sum(wide), 2)


@given(shapes, st.integers(1, 99).map(lambda p: Fraction(p, 100)), st.sampled_from(SPARSE_FORMS))
def test_flops_are_the_dense_layers(shape, sparsity, member):
    weights = layer_weights(member, solve_size(member, sparsity, shape), shape)
    active = solve_units(weights, shape[0] * shape[1])
    assert active.keys() == {name for name, weight in weights.items() if weight.sparse}
    assert all(1 <= count <= weights[name].numel for name, count in active.items())
    macs = sum(active.get(name, weight.numel) for name, weight in weights.items())
    every = sum(weight.numel for weight in weights.values())
    # Exactly; where the inner width was rounded down at a low sparsity, all there is.
    assert macs == min(shape[0] * shape[1], every) or min(active.values()) == 1


@given(shapes, st.sampled_from([Fraction(1, 2), Fraction(3, 4), Fraction(9, 10)]))
def test_active_counts_are_the_nominal_ones_to_the_rounding(shape, sparsity):
    macs = shape[0] * shape[1]
    for member in ("parallel", "factorized"):
        size = solve_size(member, sparsity, shape)
        weights = layer_weights(member, size, shape)
        slack = 1 if member == "parallel" else 1 + (1 - sparsity) * max(shape) / 2
        for name, count in solve_units(weights, macs).items():
            assert abs(count - (1 - sparsity) * weights[name].numel) <= slack
    (count,) = solve_units(
        layer_weights("doped", solve_size("doped", sparsity, shape), shape), macs
    ).values()
    assert abs(count - (1 - sparsity) * macs) <= Fraction(sum(shape), 2)


@given(shapes, sparsities)
def test_search_spaces_have_the_cardinality_of_table_1(shape, sparsity):
    def cardinality(member: str) -> tuple[int, int]:
        size = solve_size(member, sparsity, shape)
        weights = layer_weights(member, size, shape).values()
        return size, sum(weight.numel for weight in weights if weight.sparse)

    k_sp, parallel = cardinality("parallel")
    d_sf, factorized = cardinality("factorized")
    assert parallel == k_sp * shape[0] * shape[1]
    assert factorized == d_sf * sum(shape)
    assert cardinality("doped")[1] == shape[0] * shape[1]


def test_branches_that_are_no_whole_number_share_the_dense_count():
    assert solve_size("parallel", 0.6, (5, 7)) == 3  # 2.5: ties up
    assert solve_size("parallel", 0.55, (5, 7)) == 2  # 2.22
    active = solve_units(layer_weights("parallel", 3, (5, 7)), 35)
    assert list(active.values()) == [12, 12, 11]


def test_blocks_to_the_nearest_block():
    weights = layer_weights("doped", 32, (96, 48))
    left = 96 * 48 - 32 * (96 + 48)
    assert solve_units(weights, 96 * 48, 256) == {"sparse.weight": 1} and left == 0
    weights = layer_weights("parallel", 4, (96, 48))
    assert sum(solve_units(weights, 96 * 48, 256).values()) == 18


def test_largest_remainder_goes_first():
    weights = {"a": LayerWeight((10, 1)), "b": LayerWeight((6, 1)), "c": LayerWeight((4, 4), False)}
    assert solve_units(weights, 16 + 9) == {"a": 6, "b": 3}  # of 5.625 and 3.375
    assert solve_units(weights, 0) == {"a": 1, "b": 1}
    assert solve_units(weights, 99) == {"a": 10, "b": 6}


def test_s_0():
    assert layer_weights("parallel", 1, (3, 4)) == {"branch.0.weight": LayerWeight((3, 4))}
    assert layer_weights("doped", 0, (3, 4)) == {"sparse.weight": LayerWeight((3, 4))}


def test_inner_widths_that_blocks_divide():
    assert solve_size("factorized", 0.75, (3072, 768), multiple_of=16) == 2464  # 2457.6 = 153.6
    assert solve_size("factorized", 0.0, (8, 8), multiple_of=16) == 16
    assert solve_size("doped", 0.1, (64, 64), multiple_of=16) == 0
    assert solve_size("parallel", 0.5, (64, 64), multiple_of=16) == 2


@pytest.mark.parametrize("member", SPARSE_FORMS)
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_the_ledger_of_a_model_is_the_dense_models(member, sparsity):
    dense = linear_weights(SMALL)
    layers = {forms.layer_of(name): weight.shape for name, weight in dense.items()}
    sizes = {layer: solve_size(member, sparsity, shape) for layer, shape in layers.items()}
    transform = Transform(member, "relu", sizes)
    active = {
        f"{layer}.{name}": count
        for layer, shape in layers.items()
        for name, count in solve_units(
            forms.weights_of(transform, layer, shape), math.prod(shape)
        ).items()
    }
    flops = sequence_flops(SMALL, 1024, 50257, active, transform)
    assert flops == sequence_flops(SMALL, 1024, 50257)


def test_a_low_rank_model_counts_its_factors():
    sizes = {"h.1.attn.q": 100, "h.0.mlp.fc2": 7}
    flops = sequence_flops(SMALL, 8, 100, None, Transform("low_rank", "gelu", sizes))
    dense = sequence_flops(SMALL, 8, 100)
    assert flops.qkvo - dense.qkvo == 2 * 8 * (100 * 2 * 768 - 768**2)
    assert flops.mlp - dense.mlp == 2 * 8 * (7 * (768 + 3072) - 768 * 3072)
    assert (flops.head, flops.scores) == (dense.head, dense.scores)


def test_names():
    transform = Transform("parallel", "relu", {"h.1.attn.q": 2})
    names = linear_weights(SMALL, transform)
    assert "h.1.attn.q.branch.1.weight" in names and "h.1.attn.q.weight" not in names
    assert "h.0.attn.q.weight" in names and len(names) == 13
    assert forms.layer_of("h.1.attn.q.branch.1.weight") == "h.1.attn.q"
    assert forms.drawn_as("h.1.attn.q.branch.0.weight") == "h.1.attn.q.weight"
    assert forms.drawn_as("h.1.attn.q.branch.1.weight") == "h.1.attn.q.branch.1.weight"
    assert forms.drawn_as("h.1.attn.q.sparse.weight") == "h.1.attn.q.weight"
    assert forms.drawn_as("wte.weight") == "wte.weight"


def test_stds_of_factors():
    shape, std = (30, 60), 0.02  # r = 20
    assert weight_std("parallel", 4, shape, "branch.3.weight", std) == std
    assert weight_std("doped", 5, shape, "sparse.weight", std) == std
    for member, size, inner in (("factorized", 40, 10), ("doped", 5, 20), ("low_rank", 7, 7)):
        assert weight_std(member, size, shape, "u.weight", std) == pytest.approx(
            (std**2 / (inner * 0.77374)) ** 0.25, rel=1e-5
        )
        assert weight_std(member, size, shape, "v.weight", std) == weight_std(
            member, size, shape, "u.weight", std
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide", "relu", {}), "member 'wide' is none of"),
        (("doped", "tanh", {}), "non_linearity 'tanh' is none of"),
        (("parallel", "relu", {"h.0.attn.q": 0}), "size 0 is not 1 or more"),
        (("doped", "relu", {"h.0.attn.q": -1}), "size -1 is not 0 or more"),
        (("doped", "relu", {"h.0.attn.q": True}), "size True"),
        (("doped", "relu", [1]), "not a mapping"),
    ],
)
def test_what_a_transform_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transform(*arguments)


def test_a_sparsity_of_one_has_no_size():
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        solve_size("parallel", 1.0, (4, 4))
