"""Counts of kept blocks: nominal at the published widths, solved again where blocks rule."""

import pytest

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
from sparse_gpt.ift.iso_flop import residual
from sparse_gpt.sparse_units import sparse_units


def config(sparsity, **sections):
    tree = {
        "data": [{"path": "x"}],
        "max_steps": 1,
        "model": {"preset": "gpt3-small"},
        "ift": {"member": "wide"},
        "sparsity": sparsity,
        **sections,
    }
    return validate(RunConfig, tree, "test")


def test_unstructured_keeps_the_nominal_sparsity():
    units = sparse_units(config({"sparsity": 0.5}))
    assert units["h.0.attn.q.weight"] == (1092 * 1092 // 2, 1092 * 1092)
    assert len(units) == 72


def test_blocks_are_solved_again_to_the_base_layers_flops():
    run = config({"sparsity": 0.5, "structure": {"type": "block", "block": [16, 16]}})
    assert run.dims["d_model"] == 1104
    kept, count = sparse_units(run)["h.3.attn.o.weight"]
    assert (kept, count) == (768 * 768 // 256, 69 * 69)
    assert kept != round(count / 2)


def test_without_widening_blocks_keep_the_nominal_sparsity():
    run = config(
        {"sparsity": 0.75, "structure": {"type": "block", "block": [16, 16]}},
        ift={"member": "none"},
    )
    assert sparse_units(run)["h.3.attn.o.weight"] == (48 * 48 // 4, 48 * 48)


def test_dense_has_none_and_a_filter_must_match():
    assert sparse_units(config({"sparsity": 0.0})) == {}
    only = sparse_units(config({"sparsity": 0.75, "param_filter": ["h.*.mlp.*"]}))
    assert len(only) == 24
    with pytest.raises(UserError, match="mlq"):
        sparse_units(config({"sparsity": 0.75, "param_filter": ["h.*.mlq.*"]}))


def active(run):
    return {name: kept for name, (kept, _) in sparse_units(run).items()}


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.9])
def test_members_keep_every_layers_flops(member, sparsity):
    run = config({"sparsity": sparsity}, ift={"member": member})
    report = residual(run.base_dims, run.dims, active(run), run.transform)
    assert [r.excess for r in report.values()] == [0] * 7


def test_members_in_blocks_are_near():
    structure = {"type": "block", "block": [16, 16]}
    run = config({"sparsity": 0.9, "structure": structure}, ift={"member": "factorized"})
    kept = active(run)
    assert kept["h.0.attn.q.u.weight"] + kept["h.0.attn.q.v.weight"] == 768 * 768 // 256
    weights = {name: count * 256 for name, count in kept.items()}
    assert residual(run.base_dims, run.dims, weights, run.transform)["all"].excess == 0


def test_a_members_own_sparsity_leaves_the_counts_nominal():
    run = config({"sparsity": 0.75}, ift={"member": "parallel", "sparsity": 0.5})
    assert sparse_units(run)["h.0.attn.q.branch.1.weight"] == (768 * 768 // 4, 768 * 768)


def test_weights_that_are_dense_have_no_units():
    run = config({"sparsity": 0.75}, ift={"member": "doped", "keep_dense": ["h.[2-9].*", "h.1?.*"]})
    units = sparse_units(run)
    assert len(units) == 12 and all(name.endswith(".sparse.weight") for name in units)
    left = 768 * 768 - 288 * 2 * 768  # 288 = 0.75 * 768 / 2
    assert units["h.1.attn.v.sparse.weight"] == (left, 768 * 768)
    wide = config({"sparsity": 0.75}, ift={"member": "wide", "keep_dense": ["h.0.*"]})
    assert len(sparse_units(wide)) == 66


def test_a_filter_may_name_the_weights_of_a_form():
    sparsity = {"sparsity": 0.75, "param_filter": ["h.3.attn.q.branch.0.weight"]}
    ift = {"member": "parallel", "sizes": {"h.3.attn.q": 4}}
    assert list(sparse_units(config(sparsity, ift=ift))) == ["h.3.attn.q.branch.0.weight"]
