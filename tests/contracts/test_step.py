"""One optimizer step in real ranks: non-finite numbers, held steps, the clip norm, weight decay."""

import math

import pytest
import torch

from sparse_gpt.errors import UserError
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.optim import optimizer_steps
from tests.contracts.runs import (
    after_every_step,
    assemble,
    masks,
    model_weights,
    run_config,
    trainer,
)
from tests.ranks import run_ranks

LAYOUTS = [(stage, "fp32", "none") for stage in (0, 1, 2, 3)]
LAYOUTS += [(stage, "bf16", "none") for stage in (1, 2, 3)]
OFFLOADED = [(1, "bf16", "cpu"), (2, "bf16", "cpu"), (2, "fp32", "cpu"), (3, "bf16", "cpu")]


def changes(stage, precision="fp32", offload="none", **more):
    return {
        "deepspeed__zero_stage": stage,
        "deepspeed__offload_optimizer": offload,
        "precision": precision,
        "sparsity__algorithm": "rigl",
        **more,
    }


def snapshot(made):
    """Copies of everything a held or skipped step must not touch, on this rank."""
    kept = {
        (name, kind): tensor.clone()
        for name, fragment in made.shards.fragments()
        for kind, tensor in fragment.tensors().items()
    }
    for name in made.shards.parameters:
        # The first copy only: gathered ones come and go between steps.
        kept[name, "model"] = next(model_weights(made, name))[1].detach().clone()
    return kept, masks(made), optimizer_steps(made.optimizer)


def same(before, after):
    """What differs between two snapshots; empty if nothing."""
    names = {key for key in before[0].keys() | after[0].keys()
             if key not in before[0] or not torch.equal(before[0][key], after[0][key])}  # fmt: skip
    moved = {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}
    return names | moved | ({"optimizer steps"} if before[2] != after[2] else set())


class Poison:
    """Infinite numbers on the last rank at chosen steps: in the forward pass or only backward."""

    def __init__(self, made, loss_steps, gradient_steps):
        self.made, self.loss_steps, self.gradient_steps = made, loss_steps, gradient_steps
        self.step = 0
        made.engine.module.ln_f.register_forward_hook(self)
        inner = made.controller.begin_step

        def begin_step(step):
            self.step = step
            inner(step)

        made.controller.begin_step = begin_step

    def __call__(self, module, inputs, output):
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return output
        if self.step in self.loss_steps:
            return output * math.inf
        if self.step in self.gradient_steps and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output


def poisoned_run(corpus, out, config_changes):
    """Steps 4 and 8 have a non-finite gradient, 6 (an update) and 7 a non-finite loss."""
    seen, before = [], None
    with trainer(run_config(corpus, out, **config_changes)) as made:
        Poison(made, loss_steps=(6, 7), gradient_steps=(4, 8))

        def look(step, health, update):
            nonlocal before
            after = snapshot(made)
            if step in (4, 6, 7, 8):
                assert not health.finite
                assert math.isfinite(health.loss) == (step in (4, 8))
                assert update is None
                assert same(before, after) == set(), step
            else:
                assert health.finite, step
                assert same(before, after) != set() if before else True
            before = after
            seen.append((step, health.finite, update is not None))

        after_every_step(made, look)
        state = made.fit()
        assert (state.step, state.skipped_steps, state.samples) == (12, 4, 12 * 8)
        assert optimizer_steps(made.optimizer) == 8
        for key, tensor in snapshot(made)[0].items():
            assert torch.isfinite(tensor).all(), key
    return seen


@pytest.mark.parametrize("layout", LAYOUTS + OFFLOADED, ids=str)
def test_a_non_finite_step_changes_nothing(corpus, tmp_path, layout):
    results = run_ranks(2, poisoned_run, corpus, str(tmp_path / "run"), changes(*layout))
    assert results[0] == results[1]
    assert [step for step, _, updated in results[0] if updated] == [3]  # 6 was skipped, 9 is past
    records = (tmp_path / "run/metrics.jsonl").read_text()
    assert records.count('"loss": "nan"') + records.count('"loss": "inf"') == 2


def always_poisoned(corpus, out, config_changes):
    with trainer(run_config(corpus, out, **config_changes)) as made:
        Poison(made, loss_steps=range(5, 100), gradient_steps=(3,))
        history = {}
        after_every_step(made, lambda step, *_: history.update({step: snapshot(made)}))
        with pytest.raises(UserError) as caught:
            made.fit()
        assert same(history[2], history[3]) == same(history[4], history[7]) == set()
        return str(caught.value), made.state.step, made.state.skipped_steps


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_of_non_finite_steps_ends_it(corpus, tmp_path, stage):
    config_changes = changes(stage, optimizer__max_nonfinite_steps=3, max_steps=20)
    out = tmp_path / "run"
    for message, step, skipped in run_ranks(2, always_poisoned, corpus, str(out), config_changes):
        assert "3 steps in a row" in message
        assert "step 7" in message and "of step 4" in message
        assert "optimizer.lr" in message
        assert (step, skipped) == (7, 4)
    assert not list((out / "checkpoints").glob("step-*"))


def replaced_run(corpus, out, config_changes):
    """On update steps nothing but the topology, and what left it, may change."""
    before, norms = None, []
    with trainer(run_config(corpus, out, **config_changes)) as made:

        def look(step, health, update):
            nonlocal before
            after = snapshot(made)
            if update is not None:
                assert before is not None
                assert update.replaced > 0
                assert after[2] == before[2], "Adam's step count is held"
                norms.append(health.grad_norm)
                for (name, kind), tensor in after[0].items():
                    old = before[0][name, kind]
                    if name not in after[1]:
                        assert torch.equal(tensor, old), (step, name, kind)
                        continue
                    start = dict(starts(made, name))[kind]
                    part = slice(start, start + tensor.numel())
                    stays = (before[1][name] & after[1][name]).reshape(-1)[part]
                    assert torch.equal(tensor[stays], old[stays]), (step, name, kind)
                    assert not tensor[~stays].any(), (step, name, kind)
                    assert old[stays].any()
            elif before is not None:
                assert after[2] == before[2] + 1
            before = after

        after_every_step(made, look)
        made.fit()
    return norms


def starts(made, name):
    fragment = made.shards.fragment(name)
    if fragment is not None:
        yield from ((kind, fragment.start) for kind in fragment.tensors())
    yield "model", next(model_weights(made, name))[0]


@pytest.mark.parametrize("layout", LAYOUTS + OFFLOADED, ids=str)
def test_an_update_may_replace_the_optimizer_step(corpus, tmp_path, layout):
    update = {"freq": 3, "mode": "replace"}
    config_changes = changes(*layout, sparsity__update=update)
    norms = run_ranks(2, replaced_run, corpus, str(tmp_path / "run"), config_changes)[0]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)


def update_step_inputs(corpus, out, config_changes):
    """Batches, weights and masks at step 3 (a RigL update), and the norm that was logged."""
    batches, weights, logged, topology = [], {}, {}, {}
    with trainer(run_config(corpus, out, **config_changes)) as made:
        inner = made._step

        def record(stream):
            for batch in stream:
                batches.append((batch["input_ids"], batch["targets"]))
                yield batch

        def step_and_record(step, stream):
            if step == 3:
                for name in made.shards.parameters:
                    fragment = made.shards.fragment(name)
                    local = None if fragment is None else fragment.master
                    weights[name] = assemble(made, name, local).clone()
                topology.update(masks(made))
                batches.clear()
            result = inner(step, record(stream))
            logged[step] = result[0].grad_norm
            return result

        made._step = step_and_record
        made.fit()
    return batches[: len(batches) // 2], weights, topology, logged[3]  # without step 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norm_of_a_growing_step_covers_the_trained_set_only(corpus, tmp_path, stage):
    config = run_config(corpus, str(tmp_path / "run"), max_steps=3)
    more = {"max_steps": 4, "sparsity__update": {"freq": 3, "stop": 4}}
    results = run_ranks(
        2, update_step_inputs, corpus, str(tmp_path / "run"), changes(stage, **more)
    )
    model = GPT(config.gpt_config(257))
    weights, topology = results[0][1], results[0][2]
    model.load_state_dict(weights)
    micro_batches = [batch for result in results for batch in result[0]]
    assert len(micro_batches) == 4
    for inputs, targets in micro_batches:
        (model(inputs, targets) / len(micro_batches)).backward()
    inside = outside = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        mask = topology.get(name, torch.ones_like(parameter, dtype=torch.bool))
        inside += float(parameter.grad[mask].double().square().sum())
        outside += float(parameter.grad[~mask].double().square().sum())
    for *_, norm in results:
        assert norm == pytest.approx(inside**0.5, rel=1e-5)
    assert (inside + outside) ** 0.5 > 1.1 * inside**0.5  # the dense norm would be noticed


def zero_gradient_run(corpus, out, config_changes):
    with trainer(run_config(corpus, out, **config_changes)) as made:
        inner, before = made.controller.before_step, snapshot(made)

        def before_step(step):
            finite = inner(step)
            made.shards.zero_gradients()
            return finite

        made.controller.before_step = before_step
        made.fit()
        lr, decay = made.optimizer.param_groups[0]["lr"], 0.5
        for (name, kind), tensor in snapshot(made)[0].items():
            old = before[0][name, kind]
            linear = ".attn." in name or ".mlp." in name
            if kind == "master" and linear and name.endswith("weight"):
                assert torch.allclose(tensor, old * (1 - lr * decay), rtol=1e-6, atol=0), name
                assert not torch.equal(tensor, old), name
                assert torch.equal(tensor == 0, old == 0), name
            elif kind.startswith("exp"):
                assert not tensor.any(), (name, kind)
            elif not linear or not name.endswith("weight"):
                assert torch.equal(tensor, old), (name, kind)
        return made.state.step


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_only_linear_weights_decay(corpus, tmp_path, layout):
    more = {"max_steps": 1, "optimizer__weight_decay": 0.5, "optimizer__lr": 0.1,
            "schedule__warmup_steps": 0}  # fmt: skip
    config_changes = changes(*layout, **more)
    assert run_ranks(2, zero_gradient_run, corpus, str(tmp_path / "run"), config_changes) == [1, 1]


def clipped_run(corpus, out, config_changes):
    """Norm before and after clipping, over all ranks, of every step."""
    import sparse_gpt.train.loop as loop

    norms, inner, inspect = [], loop.clip_gradients, loop.inspect_step
    last = []

    def remember(*arguments):
        last[:] = arguments
        return inspect(*arguments)

    def clip(shards, norm, max_norm):
        inner(shards, norm, max_norm)
        norms.append((norm, inspect(*last).grad_norm))

    loop.clip_gradients, loop.inspect_step = clip, remember
    try:
        with trainer(run_config(corpus, out, **config_changes)) as made:
            made.fit()
    finally:
        loop.clip_gradients, loop.inspect_step = inner, inspect
    return norms


@pytest.mark.parametrize("layout", LAYOUTS + OFFLOADED, ids=str)
def test_gradients_are_clipped_to_the_norm(corpus, tmp_path, layout):
    config_changes = changes(*layout, optimizer__grad_clip=0.25, max_steps=6)
    for norms in run_ranks(2, clipped_run, corpus, str(tmp_path / "run"), config_changes):
        assert len(norms) == 6
        for before, after in norms:
            assert before > 0.25
            assert after == pytest.approx(0.25, rel=1e-4)
