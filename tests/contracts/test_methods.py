"""Every sparse training method in a real run: trained, resumed twice, planned, exported."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_gpt.config import RunConfig
from sparse_gpt.errors import UserError
from sparse_gpt.hf import import_folder
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.model.gpt import GPT
from sparse_gpt.plan import plan
from tests.contracts.runs import after_every_step, assemble, run_config, trainer
from tests.contracts.sessions import saved_at
from tests.ranks import run_ranks
from tests.tiny import write_texts

ROOT = Path(__file__).resolve().parents[2]
STEPS, MIDDLE = 60, 28
IDS = torch.arange(64).view(2, 32) % 251
METHODS = {
    "static": {},
    "set": {},
    "rigl": {},
    "rigl replacing": {"update": {"freq": 5, "mode": "replace"}},
    "gmp": {},
    "granet": {},
    "ac_dc": {"ac_dc": {"dense_sparsity": 0.25, "reset_moments": True}},
    "top_kast": {"top_kast": {"backward_sparsity": 0.5}},
    "search_spaces fix": {"search_spaces": {"exploit": "fix"}},
    "search_spaces reset": {"search_spaces": {"exploit": "reset", "z": 8}},
    "search_spaces regularize": {"search_spaces": {"exploit": "regularize", "beta": 0.01}},
    "gmp powerpropagation": {"powerpropagation": 2.0},
}
OTHERS = [(1, 0, "fp32"), (2, 0, "fp32"), (2, 1, "bf16"), (3, 2, "bf16"), (2, 3, "fp32")]
OTHERS += [(3, 3, "bf16")]


def changes(method: str, ranks: int, stage: int, precision: str):
    """A model of width 32; updates every 5 steps, so the middle is between two of them."""
    sparsity = {"sparsity": 0.75, "algorithm": method.split()[0], "update": {"freq": 5}}
    return {
        "max_steps": STEPS,
        "global_batch_size": 12 if ranks == 3 else 8,
        "model": {"n_layer": 1, "n_head": 2, "d_model": 32, "init_std": 0.08},
        "model__dropout": 0.1,
        "sparsity": sparsity | METHODS[method],
        "optimizer__weight_decay": 0.0 if method == "top_kast" else 0.1,
        "deepspeed__zero_stage": stage,
        "precision": precision,
        "checkpoint": {"every": MIDDLE, "keep_last": 3},
        "logging__every": 20,
    }


def train(corpus: str, out: str, config_changes: dict):
    """(step, loss, digest of masters, moments and masks) of each step; state, and last logits."""
    seen = []
    with trainer(run_config(corpus, out, **config_changes)) as made:

        def look(step, health, update):
            digest = hashlib.sha256(made.controller.digest().encode())
            for name, fragment in made.shards.fragments():
                digest.update(f"{name}/{fragment.start}".encode())
                for tensor in fragment.tensors().values():
                    digest.update(tensor.detach().contiguous().numpy().tobytes())
            seen.append((step, health.loss, digest.hexdigest()))

        after_every_step(made, look)
        state = made.fit()
        made.engine.eval()
        with torch.no_grad():
            logits = made.engine.module(IDS).float().numpy()
    return seen, state, logits


def check(corpus: str, tmp_path: Path, method: str, ranks: int, stage: int, precision: str):
    given = changes(method, ranks, stage, precision)
    results = run_ranks(ranks, train, corpus, str(tmp_path / "whole"), given)
    saved_at(tmp_path / "whole", MIDDLE, tmp_path / "resumed")
    stopping = given | {"stop_at": MIDDLE + 4}
    between = run_ranks(ranks, train, corpus, str(tmp_path / "resumed"), stopping)
    again = run_ranks(ranks, train, corpus, str(tmp_path / "resumed"), given)
    for (seen, state, logits), (seen_between, *_), (seen_again, state_again, logits_again) in zip(
        results, between, again
    ):
        assert seen_between + seen_again == seen[MIDDLE:]
        assert len(seen_between) == 4
        assert state_again == state
        assert np.array_equal(logits, logits_again)
    seen, state, logits = results[0]
    assert [step for step, *_ in seen] == list(range(1, STEPS + 1))
    losses = [loss for _, loss, _ in seen]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    config: RunConfig = run_config(corpus, tmp_path, **given)
    assert state.skipped_steps == 0
    assert state.flops_spent == plan(config, 257, ranks).flops_total

    exported = export_checkpoint(tmp_path / "whole", tmp_path / "exported")
    assert exported.sparsity == 0.75
    gpt_config, parameters = import_folder(tmp_path / "exported")
    model = GPT(gpt_config)
    model.load_state_dict(parameters)
    model.eval()
    with torch.no_grad():
        mine = model(IDS).numpy()
    if precision == "fp32":
        # Equal products summed in another order, by another thread count or in another memory.
        np.testing.assert_allclose(mine, logits, rtol=0, atol=1e-5)
    else:
        np.testing.assert_allclose(mine, logits, rtol=0, atol=0.1)


OVER = {
    "wide": {"ift": {"member": "wide"}, "model__d_model": 16},
    "parallel": {"ift": {"member": "parallel"}},
    "factorized": {"ift": {"member": "factorized"}},
    "doped": {"ift": {"member": "doped"}},
    "blocks": {"sparsity__structure": {"type": "block", "block": [2, 4]}},
    "model scope": {"sparsity__update": {"freq": 3, "scope": "model"}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What this project says about itself, paragraph by paragraph."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    paragraphs = [p for file in files for p in file.read_text().split("\n\n") if len(p) > 200]
    folder = tmp_path_factory.mktemp("text") / "readme"
    return str(write_texts(folder, paragraphs[20:], paragraphs[:10], paragraphs[10:20]))


@pytest.mark.parametrize("method", METHODS)
def test_trains_resumes_and_is_exported(text, tmp_path, method):
    check(text, tmp_path, method, 2, 2, "fp32")


def first_step(corpus: str, out: str, config_changes: dict):
    """Masters of the sparse layers at the start, whole, and the loss of step 1."""
    with trainer(run_config(corpus, out, **config_changes)) as made:
        weights = {}
        for name in made.controller.layers:
            fragment = made.shards.fragment(name)
            weights[name] = assemble(made, name, None if fragment is None else fragment.master)
        losses = []
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
    return weights, losses[0]


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_powers_of_weights_begin_as_the_weights(text, tmp_path, alpha):
    given = changes("static", 2, 2, "fp32") | {"stop_at": 1}
    power = given | {"sparsity": given["sparsity"] | {"powerpropagation": alpha}}
    plain, loss = run_ranks(2, first_step, text, str(tmp_path / "plain"), given)[0]
    thetas, loss_there = run_ranks(2, first_step, text, str(tmp_path / "power"), power)[0]
    for name, theta in thetas.items():
        weight = theta.sign() * theta.abs() ** alpha
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=0.0)
        assert not torch.equal(theta, plain[name])
    assert loss_there == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", OTHERS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_in_other_layouts(text, tmp_path, method, layout):
    check(text, tmp_path, method, *layout)


@pytest.mark.slow
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("method", METHODS)
def test_over_members_and_blocks(text, tmp_path, method, over):
    """A run of 24 steps that is resumed in the middle, and costs what is foreseen of it."""
    given = changes(method, 2, 2, "fp32")
    for key, value in OVER[over].items():
        section, _, name = key.partition("__")
        if not name:
            given[section] = value
        elif isinstance(given.get(section), dict):
            given[section] = given[section] | {name: value}
    given |= {"max_steps": 24, "checkpoint": {"every": 13, "keep_last": 3}}
    if "powerpropagation" in method and over == "blocks":
        with pytest.raises(UserError, match="powerpropagation: blocks"):
            run_config(text, tmp_path, **given)
        return
    if "replacing" in method and over == "model scope":
        given["sparsity"]["update"] = given["sparsity"]["update"] | {"mode": "replace"}
    results = run_ranks(2, train, text, str(tmp_path / "whole"), given)
    saved_at(tmp_path / "whole", 13, tmp_path / "resumed")
    again = run_ranks(2, train, text, str(tmp_path / "resumed"), given)
    for (seen, state, logits), (seen_again, state_again, logits_again) in zip(results, again):
        assert seen_again == seen[13:]
        assert state_again == state
        assert np.array_equal(logits, logits_again)
    foreseen = plan(run_config(text, tmp_path, **given), 257, 2)
    assert results[0][1].flops_spent == foreseen.flops_total
    exported = export_checkpoint(tmp_path / "whole", tmp_path / "exported")
    assert exported.sparsity == pytest.approx(foreseen.achieved_sparsity, abs=1e-12)
