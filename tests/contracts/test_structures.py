"""N:M and balanced rows in real ranks: the same topology as on one, and runs that resume."""

import numpy as np
import pytest
from safetensors.torch import load_file

from sparse_gpt.topology.random import random_scores
from tests.contracts.runs import WIDTH, after_every_step, masks, run_config, trainer
from tests.contracts.test_injected import STEP, check_fragments, configuration, run, scores
from tests.contracts.test_resume import state_digest
from tests.ranks import run_ranks

LAYOUTS = [(1, 0, "fp32", "none"), (2, 2, "fp32", "none")]
BLOCK, LAYER = (2, 4), "h.0.attn.q.weight"


def n_m(n, m, transposable=False):
    structure = {"type": "n_m", "n": n, "m": m, "transposable": transposable}
    return {"sparsity__structure": structure, "sparsity__sparsity": 1 - n / m}


STRUCTURES = {
    "2:4": n_m(2, 4),
    "2:4 transposable": n_m(2, 4, True),
    "2:8 transposable": n_m(2, 8, True),
    "rows": {"sparsity__structure": {"balanced": "row"}},
    "rows of blocks": {
        "sparsity__structure": {"type": "block", "block": list(BLOCK), "balanced": "row"}
    },
}


def is_allowed(mask, structure):
    """Whether a mask (of weights, or blocks) has the same number in every group."""
    if "n" not in structure:
        return len(set(mask.sum(1).tolist())) == 1
    n, m = structure["n"], structure["m"]
    ways = (mask, mask.T) if structure["transposable"] else (mask,)
    return all((way.reshape(-1, m).sum(1) == n).all() for way in ways)


def kept_of(active, magnitude, fraction):
    """Without the smallest of a layer, by Python's sort."""
    kept, flat = active.reshape(-1).copy(), magnitude.reshape(-1)
    order = sorted(np.flatnonzero(kept), key=lambda i: (flat[i], i))
    kept[order[: int(fraction * len(order))]] = False
    return kept


def refilled(kept, growth, active, width):
    """Every group of `width` units with as many as it had, by Python's sort."""
    new = kept.copy()
    for start in range(0, kept.size, width):
        group = range(start, start + width)
        free = sorted((i for i in group if not kept[i]), key=lambda i: (-growth[i], i))
        lost = int(active.reshape(-1)[group].sum() - kept[group].sum())
        new[free[:lost]] = True
    return new.reshape(active.shape)


@pytest.mark.parametrize(
    ("method", "name"),
    [*(("rigl", name) for name in STRUCTURES), ("set", "2:4"), ("set", "2:8 transposable")],
)
def test_an_update_is_by_the_book_on_any_ranks(corpus, tmp_path, method, name):
    changes = STRUCTURES[name]
    structure = changes["sparsity__structure"]
    block = BLOCK if "block" in structure else (1, 1)
    arguments, reference = (method, block, "replace"), None
    for layout in LAYOUTS:
        results = run(corpus, tmp_path, layout, arguments, **changes)
        values = load_file(tmp_path / "injected.safetensors")
        check_fragments(results, values)
        reference = reference or results[0]
        config = configuration("unused", "unused", *arguments, **changes)
        fraction = 0.3 / 2 * (1 + np.cos(np.pi * STEP / config.update_stop(1)))
        for layer, active in results[0][0].items():
            for one, other in zip((reference, *results[1:]), (results[0], *results)):
                assert np.array_equal(one[0][layer], other[0][layer])
                assert np.array_equal(one[1][layer], other[1][layer])
            held = np.kron(active, np.ones(block, dtype=bool))
            magnitude = scores(values[f"master/{layer}"].numpy() * held, block)
            growth = scores(values[f"gradient/{layer}"].numpy(), block).reshape(-1)
            if method == "set":
                growth = random_scores(config.seed, 1, layer, 0, active.size).numpy()
            new, kept = results[0][1][layer], kept_of(active, magnitude, fraction)
            assert is_allowed(active, structure) and is_allowed(new, structure)
            assert not np.array_equal(active, new)
            if structure.get("transposable"):
                assert new.reshape(-1)[kept].all()
            else:
                width = structure.get("m", active.shape[1])
                assert np.array_equal(new, refilled(kept, growth, active, width))


def train(corpus, out, changes):
    """What this rank ends with, and active units of a layer after each step; all are allowed."""
    seen = []
    config = run_config(corpus, out, **changes)
    with trainer(config) as made:

        def look(step, health, update):
            for mask in masks(made).values():
                assert mask.all() or is_allowed(mask, changes["sparsity__structure"]), step
            seen.append((step, int(made.controller.masks[LAYER].active), update is not None))

        after_every_step(made, look)
        made.fit()
        return state_digest(made), seen


METHODS = {
    "rigl": {"sparsity__update": {"freq": 2, "stop": 1.0}},
    "ac_dc": {"sparsity__ac_dc": {"warmup": 0.15, "phase": 0.3, "last_sparse": 0.1}},
    "top_kast": {
        "sparsity__update": {"freq": 2, "stop": 1.0},
        "sparsity__top_kast": {"backward_sparsity": 0.25},
        "optimizer__weight_decay": 0.0,
    },
    "search_spaces": {"sparsity__update": {"freq": 1, "stop": 1.0}},
}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "2:4 transposable") for method in METHODS),
        pytest.param("ac_dc", "rows of blocks", marks=pytest.mark.slow),
        pytest.param("search_spaces", "2:4", marks=pytest.mark.slow),
        pytest.param("top_kast", "rows", marks=pytest.mark.slow),
    ],
)
def test_a_run_keeps_its_structure_and_resumes_bit_for_bit(corpus, tmp_path, method, name):
    changes = STRUCTURES[name] | METHODS[method] | {"sparsity__algorithm": method, "max_steps": 8}
    whole = run_ranks(2, train, corpus, str(tmp_path / "whole"), changes)
    seen = whole[0][1]
    layer, final = WIDTH * WIDTH, seen[-1][1]
    units = layer // 8 if "block" in name else layer
    assert final == units * (0.5 if name.startswith("2:4") else 0.25)
    assert {active for _, active, _ in seen} == ({final, units} if method == "ac_dc" else {final})
    assert sum(update for _, _, update in seen) >= 2
    for stop in (3, 8):
        parts = changes | ({"stop_at": stop} if stop < 8 else {})
        results = run_ranks(2, train, corpus, str(tmp_path / "parts"), parts)
        first = 0 if stop == 3 else 3
        assert [r[1] for r in results] == [w[1][first:stop] for w in whole]
    assert [r[0] for r in results] == [w[0] for w in whole]
