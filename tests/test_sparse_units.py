"""Counts of kept blocks: nominal at the published widths, solved again where blocks rule."""

import pytest

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
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
