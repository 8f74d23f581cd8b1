"""Contract 4(a) for the methods with sets of their own: every layout comes to the same sets.

`tests/topology/methods` holds the methods against their papers; here a layout is held against one
rank without ZeRO, from the same weights, moments and gradients.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.runs import assemble, masks, trainer
from tests.contracts.test_injected import (
    STEP,
    configuration,
    injected_values,
    made_batches,
    part,
)
from tests.ranks import run_ranks

METHODS = {
    "gmp": {},
    "granet": {},
    # Sparse after step 3, half dense after step 4.
    "ac_dc": {"warmup": 0.25, "phase": 0.1, "dense_sparsity": 0.5, "reset_moments": True},
    "top_kast": {"backward_sparsity": 0.5},
    "search_spaces fix": {"exploit": "fix", "v": 0.25},
    "search_spaces reset": {"exploit": "reset", "z": 3},
    "search_spaces regularize": {"exploit": "regularize", "beta": 0.25},
}
LAYOUTS = [(ranks, stage) for ranks in (1, 2, 3) for stage in (0, 1, 2, 3)]
FEW = dict(zip(METHODS, [(3, 3), (3, 1), (2, 2), (3, 2), (2, 3), (3, 3), (2, 1)]))


def two_steps(corpus, out, path, method, block, scope, stage):
    """Steps 3 and 4 on injected values; A, B, weights and moments, whole, after each of them."""
    name, values = method.split()[0], load_file(path)
    config = configuration(
        corpus, out, name, block, "follow", scope, torch.distributed.get_world_size(),
        **{f"sparsity__{name}": METHODS[method]},
        optimizer__weight_decay=0.0 if name == "top_kast" else 0.1,
        deepspeed__zero_stage=stage,
    )  # fmt: skip
    seen = []
    with trainer(config) as made:
        inner, controller = made.controller.before_step, made.controller

        def before_step(step):
            for weight in made.shards.parameters:
                fragment, gradient = made.shards.fragment(weight), made.shards.gradient(weight)
                if fragment is not None and fragment.numel:
                    gradient.copy_(part(values, "gradient", weight, fragment))
            return inner(step)

        controller.before_step = before_step
        for weight, fragment in made.shards.fragments():
            for kind, tensor in fragment.tensors().items():
                tensor.copy_(part(values, kind, weight, fragment))
        controller.zero_outside()
        made.shards.push_masters()
        with made_batches(made) as batches:
            for step in (STEP, STEP + 1):
                made._set_lr(step)
                made._step(step, batches)
                whole = {("A", n): mask for n, mask in masks(made).items()}
                for weight in made.shards.parameters:
                    fragment = made.shards.fragment(weight)
                    for kind in ("master", "exp_avg", "exp_avg_sq"):
                        local = None if fragment is None else fragment.tensors()[kind]
                        whole[kind, weight] = assemble(made, weight, local)
                seen.append((whole, controller.digest(), made.controller.counts()))
    return seen if torch.distributed.get_rank() == 0 else None


def check(corpus, tmp_path, method, layout, block=(1, 1), scope="layer"):
    path = tmp_path / "injected.safetensors"
    injected_values(configuration(corpus, tmp_path, "set", block, "follow"), path)
    one, other = (
        run_ranks(
            ranks, two_steps, corpus, str(tmp_path / "run"), str(path), method, block, scope, stage
        )[0]
        for ranks, stage in ((1, 0), layout)
    )
    for (whole, digest, counts), (whole_there, digest_there, counts_there) in zip(one, other):
        assert counts == counts_there
        assert digest == digest_there, "another A or B"
        assert whole.keys() == whole_there.keys()
        for key, tensor in whole.items():
            there = whole_there[key]
            assert torch.equal(tensor == 0, there == 0), key
            # Fused Adam rounds the last elements of a fragment in its own way.
            torch.testing.assert_close(tensor.float(), there.float(), rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(one[0][0][key], one[1][0][key]) for key in one[0][0])


@pytest.mark.parametrize("method", METHODS)
def test_a_layout(corpus, tmp_path, method):
    check(corpus, tmp_path, method, FEW[method])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_layout(corpus, tmp_path, method, layout):
    check(corpus, tmp_path, method, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "scope"), [((2, 4), "layer"), ((1, 1), "model")], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_the_whole_model(corpus, tmp_path, method, block, scope):
    for layout in ((2, 1), (3, 3)):
        check(corpus, tmp_path, method, layout, block, scope)
