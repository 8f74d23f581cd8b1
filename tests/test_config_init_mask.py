"""`sparsity.init_mask`: combinations that make no sense are refused by name."""

import pytest

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError

BLOCK = {"type": "block", "block": [4, 4]}

REFUSED = {
    "nothing sparse": ({"sparsity": 0.0, "init_mask": "snip"}, "init_mask: snip needs a sparsity"),
    "ticket of no run": ({"init_mask": "lottery"}, "needs lottery: {final: <run folder>}"),
    "ticket unused": (
        {"init_mask": "snip", "lottery": {"final": "runs/a"}},
        "lottery is set, but init_mask is snip",
    ),
    "batches unused": ({"scoring": {"batches": 2}}, "init_mask: random looks at no batch"),
    "rounds unused": (
        {"init_mask": "snip", "scoring": {"rounds": 9}},
        "scoring.rounds is set, but init_mask is snip, not force",
    ),
    "one round": ({"init_mask": "force", "scoring": {"rounds": 1}}, "sparsity.scoring.rounds"),
    "grasp of blocks": (
        {"init_mask": "grasp", "structure": BLOCK},
        "use structure type unstructured, or init_mask: snip or force",
    ),
    "two distributions": (
        {"init_mask": "force", "distribution": "erdos_renyi"},
        "distribution: erdos_renyi in another way",
    ),
    "layers of their own": (
        {"init_mask": "force", "layer_sparsity": {"h.0.*": 0.75}},
        "layer_sparsity in another way",
    ),
    "counts that move": (
        {"init_mask": "snip", "algorithm": "gmp"},
        "the final count, which gmp does not start from",
    ),
    "powers of weights": ({"init_mask": "snip", "powerpropagation": 2.0}, "trains powers of them"),
    "rows of one count": (
        {"init_mask": "snip", "structure": {"balanced": "row"}},
        "structure.balanced fixes how many of a group stay",
    ),
    "groups of M": (
        {"init_mask": "snip", "sparsity": 0.5, "structure": {"type": "n_m", "n": 2, "m": 4}},
        "structure.n_m fixes how many of a group stay",
    ),
}


def make(sparsity, **more):
    tree = {
        "data": [{"path": "corpus"}],
        "seq_len": 32,
        "max_steps": 10,
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64},
        "sparsity": {"sparsity": 0.5, **sparsity},
        **more,
    }
    return validate(RunConfig, tree, "test.yaml")


@pytest.mark.parametrize(("sparsity", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(sparsity, message):
    with pytest.raises(UserError) as caught:
        make(sparsity)
    assert message in str(caught.value)


def test_two_sources_of_weights():
    ticket = {"init_mask": "lottery", "lottery": {"final": "runs/a", "rewind": "runs/a/step"}}
    assert make(ticket).sparsity.lottery is not None
    with pytest.raises(UserError, match="both say where the weights come from"):
        make(ticket, init_from="gpt2")


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_blocks_and_methods_of_a_fixed_count(algorithm):
    for kind in ("snip", "force"):
        config = make({"init_mask": kind, "algorithm": algorithm, "structure": BLOCK})
        assert config.sparsity.init_mask == kind
