"""Contracts 1, 2 and 3 after every step of real runs: zeros, exact counts, one topology."""

import pytest
import torch

from sparse_gpt.model.flops import kept_units
from tests.contracts.layouts import changes, every_layout, label, pairwise
from tests.contracts.runs import after_every_step, masks, model_weights, run_config, trainer
from tests.ranks import run_ranks

STEPS, UPDATES = 12, (3, 6, 9)
PAIRWISE = pairwise()
REST = [layout for layout in every_layout() if layout not in PAIRWISE]


def watch(corpus, out, config_changes):
    """Check everything after every step in this rank; returns (digest, grown) of every step."""
    seen = []
    with trainer(run_config(corpus, out, max_steps=STEPS, **config_changes)) as made:
        b_out, b_in = made.config.sparsity.structure.block
        expected = {
            name: kept_units(made.shards.shape(name)[0] * made.shards.shape(name)[1]
                             // (b_out * b_in), 0.75)
            for name in made.controller.layers
        }  # fmt: skip
        before = masks(made)
        assert len(before) == 12
        assert {name: int(mask.sum()) for name, mask in before.items()} == expected

        def look(step, health, update):
            nonlocal before
            assert health.finite
            now = masks(made)
            assert {name: int(mask.sum()) for name, mask in now.items()} == expected
            assert made.controller.counts()[0] == sum(expected.values()) * b_out * b_in
            grown = 0
            for name, pattern in made.controller.patterns():
                outside = ~pattern.expand().reshape(-1)
                for start, weight in model_weights(made, name):
                    assert not weight[outside[start : start + weight.numel()]].any(), (step, name)
                check_fragment(made, name, step, outside, expand(now[name] & ~before[name], made))
                grown += int((now[name] & ~before[name]).sum())
            assert (update is None) == (step not in UPDATES or not made.controller.method.dynamic)
            if update is not None:
                assert update.replaced == grown
                assert update.active == sum(expected.values())
            seen.append((made.controller.digest(), grown))
            before = now

        after_every_step(made, look)
        assert made.fit().step == STEPS
    return seen


def expand(mask, made):
    b_out, b_in = made.config.sparsity.structure.block
    return mask.repeat_interleave(b_out, 0).repeat_interleave(b_in, 1).reshape(-1)


def check_fragment(made, name, step, outside, grown):
    fragment = made.shards.fragment(name)
    if fragment is None or not fragment.numel:
        return
    part = slice(fragment.start, fragment.start + fragment.numel)
    for kind, tensor in fragment.tensors().items():
        assert tensor.shape == (fragment.numel,)
        assert not tensor[outside[part]].any(), (step, name, kind)
        assert not tensor[grown[part]].any(), (step, name, kind, "a grown weight starts at 0")
        if kind == "master" and step in UPDATES:
            continue
        # Active weights have moments: nothing zeroes more than it should. Some gradients are zero
        # by the pattern alone: a row of q whose counterpart in k has no weight left.
        held = made.controller.holds_step(step)
        alive = tensor[~outside[part] & ~grown[part]]
        if not held and alive.numel() > 50:
            assert (alive != 0).float().mean() > 0.8, (step, name, kind)


def check(corpus, tmp_path, layout):
    results = run_ranks(layout["ranks"], watch, corpus, str(tmp_path / "run"), changes(layout))
    assert all(result == results[0] for result in results), "the ranks' topologies differ"
    grown = [count for _, count in results[0]]
    for step, count in enumerate(grown, start=1):
        moves = step in UPDATES and layout["method"] != "static"
        assert (count > 0) == moves, (step, count)


@pytest.mark.parametrize("layout", PAIRWISE, ids=label)
def test_after_every_step(corpus, tmp_path, layout):
    check(corpus, tmp_path, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", REST, ids=label)
def test_after_every_step_in_every_other_layout(corpus, tmp_path, layout):
    check(corpus, tmp_path, layout)


def test_the_subset_has_every_pair():
    def pairs(rows):
        return {(a, b) for row in rows for a in row.items() for b in row.items()}

    assert pairs(PAIRWISE) == pairs(every_layout())
    assert len(PAIRWISE) < 30


def first_topology(corpus, out, config_changes):
    with trainer(run_config(corpus, out, **config_changes)) as made:
        return made.controller.digest()


def test_the_first_topology_and_weights_do_not_depend_on_the_layout(corpus, tmp_path):
    digests = set()
    for ranks, stage, precision in ((1, 0, "fp32"), (2, 3, "bf16"), (3, 1, "fp32")):
        config_changes = {
            "deepspeed__zero_stage": stage, "precision": precision, "global_batch_size": 12,
        }  # fmt: skip
        digests |= set(run_ranks(ranks, first_topology, corpus, str(tmp_path), config_changes))
    assert len(digests) == 1


def disagree(corpus, out, config_changes, message):
    with trainer(run_config(corpus, out, **config_changes)) as made:
        made.controller.check_agreement()
        if torch.distributed.get_rank() == 1:
            mask = made.controller.masks["h.1.mlp.fc2.weight"]
            mask.bits.data[0] ^= 1
        with pytest.raises(RuntimeError, match=message):
            made.controller.check_agreement()


@pytest.mark.parametrize(
    ("stage", "block", "message"),
    [
        (2, [1, 1], "active units: a bug"),  # one owner a bit: only the count can be wrong
        (0, [1, 1], "topologies differ"),
        (2, [2, 4], "topologies differ"),
    ],
)
def test_one_differing_bit_is_noticed_by_every_rank(corpus, tmp_path, stage, block, message):
    structure = {} if block == [1, 1] else {"type": "block", "block": block}
    config_changes = {"deepspeed__zero_stage": stage, "sparsity__structure": structure}
    run_ranks(2, disagree, corpus, str(tmp_path / "run"), config_changes, message)
