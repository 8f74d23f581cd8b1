"""Contract 4(a): the same weights, moments and gradients give the same topology in every layout.

The expected masks come from an independent selection in numpy, so no layout is its own judge.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_gpt.config import RunConfig
from sparse_gpt.model.gpt import GPT
from sparse_gpt.topology.random import random_scores
from tests.contracts.runs import run_config, trainer
from tests.ranks import run_ranks

STEP = 3  # the first update
LAYOUTS = [
    *[(ranks, stage, "fp32", "none") for ranks in (1, 2, 3, 4, 5) for stage in (0, 1, 2, 3)],
    *[(ranks, stage, "bf16", "none") for ranks in (2, 3) for stage in (1, 2, 3)],
    *[(3, stage, precision, "cpu") for stage in (1, 2, 3) for precision in ("fp32", "bf16")],
]
# Sorted by ranks: few pools are alive at once. All stages, all ranks, most pairs of them.
DEFAULT = [
    *[(ranks, stage, "fp32", "none") for ranks, stage in ((1, 0), (1, 3), (2, 1), (2, 2))],
    (2, 1, "bf16", "none"),
    *[(3, stage, "fp32", "none") for stage in (0, 1, 2, 3)],
    *[(3, stage, precision, "cpu") for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "bf16"))],
    *[(4, stage, "fp32", "none") for stage in (0, 2, 3)],
    *[(5, stage, "fp32", "none") for stage in (1, 3)],
]
METHODS = [(method, block) for method in ("set", "rigl") for block in ((1, 1), (2, 4))]


def configuration(
    corpus, out, method, block, mode, scope="layer", ranks=None, **changes
) -> RunConfig:
    settings = {
        # 72 divides by 3 and by no power of two above 8: fragments end inside rows and blocks.
        "model__d_model": 72,
        # What is injected does not depend on it.
        "global_batch_size": 12 if ranks is None else 2 * ranks,
        "micro_batch_size": 1,
        "sparsity__algorithm": method,
        "sparsity__structure": {} if block == (1, 1) else {"type": "block", "block": list(block)},
        "sparsity__update": {"freq": STEP, "mode": mode, "scope": scope},
        # Its norm is a sum over shards, whose order is the layout's.
        "optimizer__grad_clip": 0.0,
    }
    return run_config(corpus, out, **(settings | changes))


def injected_values(config, path):
    """Random values with many ties and zeros, for every parameter; written to `path`."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(config.gpt_config(257))
    values = {}
    for name, parameter in model.named_parameters():
        for kind, levels in (("master", 40), ("exp_avg", 9), ("exp_avg_sq", 9), ("gradient", 60)):
            drawn = torch.randint(-levels, levels + 1, parameter.shape, generator=generator)
            noise = torch.rand(parameter.shape, generator=generator)
            value = torch.where(noise < 0.7, drawn.float(), drawn + noise) / 64
            values[f"{kind}/{name}"] = value.abs() if kind == "exp_avg_sq" else value
    save_file(values, path)
    return values


def inject(corpus, out, path, arguments, changes):
    """One update step on injected values in this rank; masks before and after, and fragments."""
    ranks = torch.distributed.get_world_size()
    config = configuration(corpus, out, *arguments, ranks=ranks, **changes)
    values = load_file(path)
    with trainer(config) as made:
        before = {n: p.active.numpy() for n, p in made.controller.patterns()}
        edit(made, values)
        inner = made.controller.before_step

        def before_step(step):
            for name in made.shards.parameters:
                fragment = made.shards.fragment(name)
                gradient = made.shards.gradient(name)
                if fragment is not None and fragment.numel:
                    gradient.copy_(part(values, "gradient", name, fragment))
            return inner(step)

        made.controller.before_step = before_step
        with made_batches(made) as batches:
            made._set_lr(STEP)
            _, update = made._step(STEP, batches)
        assert update is not None
        assert update.replaced > 0
        fragments = {
            name: (fragment.start, {k: t.clone().numpy() for k, t in fragment.tensors().items()})
            for name, fragment in made.shards.fragments()
        }
        after = {n: p.active.numpy() for n, p in made.controller.patterns()}
    return before, after, fragments


def made_batches(made):
    from sparse_gpt.data.loader import TrainLoader

    loader = TrainLoader(
        made.train_data,
        made.config.micro_batch_size,
        made.rank,
        made.world_size,
        made.config.accumulation(made.world_size),
    )
    return loader.batches(0)


def part(values, kind, name, fragment):
    return values[f"{kind}/{name}"].reshape(-1)[fragment.start : fragment.start + fragment.numel]


def edit(made, values):
    patterns = dict(made.controller.patterns())
    with torch.no_grad():
        for name, fragment in made.shards.fragments():
            for kind, tensor in fragment.tensors().items():
                value = part(values, kind, name, fragment).clone()
                if name in patterns:
                    mask = patterns[name].expand().reshape(-1)
                    value[~mask[fragment.start : fragment.start + fragment.numel]] = 0
                tensor.copy_(value)
        made.shards.push_masters()


def scores(values, block):
    """Block scores in numpy's own way; single weights: exact magnitudes."""
    if block == (1, 1):
        return np.abs(values)
    rows, cols = values.shape[0] // block[0], values.shape[1] // block[1]
    tiles = values.astype(np.float64).reshape(rows, block[0], cols, block[1])
    return np.sqrt((tiles**2).sum(axis=(1, 3)))


def expected_mask(active, magnitude, growth, count):
    """Sort all candidates by (score, index) in Python; no code of the library."""
    flat, m, g = active.reshape(-1).copy(), magnitude.reshape(-1), growth.reshape(-1)
    dropped = sorted(np.flatnonzero(flat), key=lambda i: (m[i], i))[:count]
    flat[dropped] = False
    grown = sorted(np.flatnonzero(~flat), key=lambda i: (-g[i], i))[:count]
    flat[grown] = True
    return flat.reshape(active.shape)


def run(corpus, tmp_path, layout, arguments, **more):
    ranks, stage, precision, offload = layout
    changes = {
        "deepspeed__zero_stage": stage,
        "precision": precision,
        "deepspeed__offload_optimizer": offload,
        **more,
    }
    path = tmp_path / "injected.safetensors"
    if not path.exists():
        injected_values(configuration(corpus, tmp_path, *arguments), path)
    return run_ranks(ranks, inject, corpus, str(tmp_path / "run"), str(path), arguments, changes)


def expected_masks(before, values, config):
    """The topology after the update, by the book: from whole tensors, with Python's sort."""
    block, names = config.sparsity.structure.block, list(before)
    fraction = 0.3 / 2 * (1 + np.cos(np.pi * STEP / config.update_stop(1)))
    magnitude, growth = {}, {}
    for name in names:
        held = np.kron(before[name], np.ones(block, dtype=bool))
        magnitude[name] = scores(values[f"master/{name}"].numpy() * held, block)
        growth[name] = scores(values[f"gradient/{name}"].numpy(), block)
        if config.sparsity.algorithm == "set":  # a pure function with tests of its own
            growth[name] = random_scores(config.seed, 1, name, 0, before[name].size).numpy()
    if config.sparsity.update.scope == "layer":
        return {
            name: expected_mask(
                before[name], magnitude[name], growth[name], int(fraction * before[name].sum())
            )
            for name in names
        }
    flat = [
        np.concatenate([of[n].reshape(-1) for n in names]) for of in (before, magnitude, growth)
    ]
    new = expected_mask(*flat, int(fraction * flat[0].sum()))
    cuts = np.cumsum([before[name].size for name in names])[:-1]
    return {
        name: part.reshape(before[name].shape)
        for name, part in zip(names, np.split(new, cuts), strict=True)
    }


def check_masks(results, values, *arguments):
    before, after, _ = results[0]
    config = configuration("unused", "unused", *arguments)
    wanted = expected_masks(before, values, config)
    assert sum(mask.sum() for mask in wanted.values()) == sum(m.sum() for m in before.values())
    for name, mask in after.items():
        for other in results[1:]:
            assert np.array_equal(mask, other[1][name]), name
        assert np.array_equal(mask, wanted[name]), name


def check_fragments(results, values):
    """Everything but what the update zeroed is as injected: both groups' moments are linked."""
    after = results[0][1]
    for _, _, fragments in results:
        for name, (start, tensors) in fragments.items():
            for kind, tensor in tensors.items():
                wanted = values[f"{kind}/{name}"].numpy().reshape(-1)[start : start + tensor.size]
                if name not in after:
                    assert np.array_equal(tensor, wanted), (name, kind)
                else:
                    assert np.all((tensor == wanted) | (tensor == 0)), (name, kind)
    covered = {name for _, _, fragments in results for name in fragments}
    assert {key.split("/")[1] for key in values} == covered


@pytest.mark.parametrize(("method", "block"), METHODS)
def test_masks_are_identical_in_every_layout(corpus, tmp_path, method, block):
    arguments = (method, block, "replace")
    reference = None
    for layout in DEFAULT if block == (1, 1) else DEFAULT[::2]:
        results = run(corpus, tmp_path, layout, arguments)
        values = load_file(tmp_path / "injected.safetensors")
        check_masks(results, values, *arguments)
        check_fragments(results, values)
        reference = reference or results[0][1]
        for name, mask in results[0][1].items():
            assert np.array_equal(mask, reference[name]), (layout, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in DEFAULT])
@pytest.mark.parametrize(("method", "block"), METHODS)
def test_masks_are_identical_in_the_other_layouts(corpus, tmp_path, method, block, layout):
    arguments = (method, block, "replace")
    reference = run(corpus, tmp_path, LAYOUTS[0], arguments)[0][1]
    results = run(corpus, tmp_path, layout, arguments)
    for name, mask in results[0][1].items():
        assert np.array_equal(mask, reference[name]), name


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_masks_after_an_applied_step_are_identical_too(corpus, tmp_path, method):
    """The update follows Adam's step here: its arithmetic is per weight, so bits agree."""
    arguments = (method, (1, 1), "follow")
    layouts = [(1, 0, "fp32", "none"), (3, 1, "fp32", "none"), (3, 2, "bf16", "cpu"),
               (2, 3, "bf16", "none"), (3, 3, "fp32", "none")]  # fmt: skip
    results = [run(corpus, tmp_path, layout, arguments)[0][1] for layout in layouts]
    for layout, masks in zip(layouts, results, strict=True):
        for name, mask in masks.items():
            assert np.array_equal(mask, results[0][name]), (layout, name)


@pytest.mark.parametrize("arguments", [("rigl", (1, 1)), ("set", (1, 1)), ("rigl", (2, 4))])
def test_selection_over_the_whole_model(corpus, tmp_path, arguments):
    arguments = (*arguments, "replace", "model")
    for layout in ((1, 0, "fp32", "none"), (3, 1, "fp32", "none"), (3, 3, "bf16", "cpu")):
        results = run(corpus, tmp_path, layout, arguments)
        values = load_file(tmp_path / "injected.safetensors")
        check_masks(results, values, *arguments)
        check_fragments(results, values)
        before, after, _ = results[0]
        assert any(after[name].sum() != before[name].sum() for name in after)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [300, 5_000])
def test_buckets_of_any_size_make_no_difference(corpus, tmp_path, stage, size):
    """Smaller than a row, and cutting through parameters."""
    arguments = ("rigl", (1, 1), "replace")
    buckets = {"deepspeed__reduce_bucket_size": size, "deepspeed__allgather_bucket_size": size}
    results = run(corpus, tmp_path, (3, stage, "fp32", "none"), arguments, **buckets)
    check_masks(results, load_file(tmp_path / "injected.safetensors"), *arguments)


def test_the_check_notices_one_wrong_bit(corpus, tmp_path):
    """The oracle is not blind: one exchanged pair of positions fails it."""
    arguments = ("rigl", (1, 1), "replace")
    results = run(corpus, tmp_path, (1, 0, "fp32", "none"), arguments)
    values = load_file(tmp_path / "injected.safetensors")
    mask = results[0][1]["h.0.attn.q.weight"]
    rows, cols = np.nonzero(mask)
    free_rows, free_cols = np.nonzero(~mask)
    mask[rows[0], cols[0]], mask[free_rows[0], free_cols[0]] = False, True
    with pytest.raises(AssertionError, match=r"h\.0\.attn\.q\.weight"):
        check_masks(results, values, *arguments)
