"""Contracts 4(b), 8 and 10: whole runs that must agree over layouts, up to rounding or exactly."""

import math

import pytest
import torch

from sparse_gpt.topology.random import random_scores
from tests.contracts.runs import after_every_step, masks, run_config, trainer
from tests.ranks import run_ranks

LAYOUTS = [(1, 4), (2, 2), (4, 1)]  # ranks, accumulation; the same global batch of 8
FREQ, STEPS = 5, 50


def changes(method, steps=STEPS, **more):
    return {
        "max_steps": steps,
        "sparsity__algorithm": method,
        "sparsity__update": {"freq": FREQ},
        "optimizer__lr": 1e-3,
        "schedule__warmup_steps": 10,
        **more,
    }


class Recorder:
    """Stands for a method and keeps what its first update saw, gathered from all ranks."""

    def __init__(self, made):
        self.made, self.method, self.first = made, made.controller.method, {}

    def __getattr__(self, name):
        return getattr(self.method, name)

    def update(self, units, sets, targets, step):
        update = self.method.update(units, sets, targets, step)
        active, new = sets.forward, update.sets.forward
        fraction = self.method.schedule.drop_fraction(step)
        for i, name in enumerate(units.names):
            if name in self.first:
                continue
            part, total = units.parts[i], active.totals[i]
            growth = random_scores(*units.key, name, 0, total)
            if self.method.growth == "gradient":
                growth = self.whole(part.start, part.gradient, total).abs()
            self.first[name] = (
                self.whole(part.start, active.parts[i].flags(), total).bool(),
                self.whole(part.start, part.master, total).abs(),
                growth,
                int(fraction * active.sizes[i]),
                self.whole(part.start, new.parts[i].flags(), total).bool(),
            )
        return update

    def whole(self, start, part, total):
        full = torch.zeros(total)
        full[start : start + part.numel()] = part.float()
        return self.made.shards.sum_over_ranks(full)


def train(corpus, out, config_changes, growth="exact"):
    """Losses, first update and last masks of a run; `growth="local"` breaks Contract 4."""
    losses = []
    with trainer(run_config(corpus, out, **config_changes)) as made:
        recorder = made.controller.method = Recorder(made)
        if growth == "local":
            grow_from_local_gradients(made)
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
        return losses, recorder.first, masks(made)


def grow_from_local_gradients(made):
    """The classic mistake: growth scores from this rank's own last micro-batch."""
    local = {}
    for name in made.controller.layers:

        def keep(gradient, name=name):
            local[name] = gradient.detach().clone().reshape(-1)

        made.shards.parameters[name].register_hook(keep)

    def stepped_gradient(fragment):
        for name, gradient in local.items():
            mine = made.shards.fragment(name)
            if mine is not None and mine.master.data_ptr() == fragment.master.data_ptr():
                return gradient[fragment.start : fragment.start + fragment.numel]
        raise AssertionError("a fragment of no sparse layer")

    made.shards.stepped_gradient = stepped_gradient


def first_update_problems(reference, other):
    """Where two first updates differ by more than rounding: one line a layer, and the share."""
    problems, differing, positions = [], 0, 0
    for name, (active, magnitude, growth, count, new) in reference.items():
        different = other[name][4] != new
        differing += int(different.sum())
        positions += new.numel()
        dropped = magnitude[active].sort().values[count - 1]
        still = active & (magnitude > dropped)
        grown = growth[~still].sort(descending=True).values[count - 1]
        near = (magnitude - dropped).abs() <= 1e-5 * dropped
        if growth.is_floating_point():
            near |= (growth - grown).abs() <= 1e-5 * grown
        if bool((different & ~near).any()):
            problems.append(f"{name}: {int((different & ~near).sum())} positions")
    if differing > 0.001 * positions:
        problems.append(f"{differing} of {positions} positions differ")
    return problems


def iou(a, b):
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return both / either


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_layouts_agree_up_to_rounding(corpus, tmp_path, method):
    runs = {}
    for ranks, accumulation in LAYOUTS:
        config_changes = changes(method) | {"deepspeed__zero_stage": (ranks + 1) % 4}
        out = str(tmp_path / f"{ranks}")
        assert run_config(corpus, out, **config_changes).accumulation(ranks) == accumulation
        runs[ranks] = run_ranks(ranks, train, corpus, out, config_changes)[0]
    losses, first, last = runs[1]
    assert len(first) == 12
    assert losses[-1] < losses[0] - 0.3
    for ranks in (2, 4):
        assert first_update_problems(first, runs[ranks][1]) == []
        assert iou(last, runs[ranks][2]) >= 0.999
        for mine, theirs in zip(losses, runs[ranks][0], strict=True):
            assert abs(mine - theirs) < 1e-4


def test_growth_from_a_local_gradient_fails_the_check(corpus, tmp_path):
    """The comparison above can fail: the classic mistake is found."""
    config_changes = changes("rigl") | {"stop_at": FREQ + 1}
    _, right, _ = run_ranks(1, train, corpus, str(tmp_path / "right"), config_changes)[0]
    _, same, _ = run_ranks(2, train, corpus, str(tmp_path / "same"), config_changes)[0]
    _, wrong, _ = run_ranks(2, train, corpus, str(tmp_path / "wrong"), config_changes, "local")[0]
    assert first_update_problems(right, same) == []
    assert len(first_update_problems(right, wrong)) > 12  # every layer, and the share


def losses_of(corpus, out, config_changes):
    losses = []
    with trainer(run_config(corpus, out, **config_changes)) as made:
        after_every_step(made, lambda step, health, update: losses.append(health.loss))
        made.fit()
    return losses


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_members_at_sparsity_zero_are_the_dense_model(corpus, tmp_path, stage, precision):
    same = {"max_steps": 10, "deepspeed__zero_stage": stage, "precision": precision,
            "sparsity": {"sparsity": 0.0}}  # fmt: skip
    dense = run_ranks(2, losses_of, corpus, str(tmp_path / "dense"), same)
    linear = {"non_linearity": "identity"}
    for member, more in (("wide", {}), ("parallel", linear), ("doped", linear)):
        run = same | {"ift": {"member": member, **more}}
        assert dense == run_ranks(2, losses_of, corpus, str(tmp_path / member), run), member
    assert len(dense[0]) == 10 and dense[0][-1] < dense[0][0]


def samples_of(corpus, out, config_changes):
    """Every sequence that this rank trained on, micro-batch by micro-batch."""
    seen = []
    with trainer(run_config(corpus, out, **config_changes)) as made:
        inner = made._step

        def step_and_record(step, batches):
            return inner(step, record(batches))

        def record(batches):
            for batch in batches:
                seen.append(batch["input_ids"].tolist())
                yield batch

        made._step = step_and_record
        made.fit()
    return seen


def global_order(by_rank):
    """Micro-batches of all ranks as one sequence: micro-step by micro-step, rank by rank."""
    return [
        tuple(row) for micro_step in zip(*by_rank, strict=True) for m in micro_step for row in m
    ]


def test_the_order_of_samples_is_independent_of_world_size_and_resume(corpus, tmp_path):
    orders = []
    for ranks, _ in LAYOUTS:
        out = str(tmp_path / f"{ranks}")
        orders.append(global_order(run_ranks(ranks, samples_of, corpus, out, {"max_steps": 6})))
    assert len(orders[0]) == 6 * 8
    assert len(set(orders[0])) == 6 * 8
    assert orders[0] == orders[1] == orders[2]
    resumed, out = [], str(tmp_path / "resumed")
    for ranks, stop in ((2, 2), (1, 3), (4, 6)):
        config_changes = {"max_steps": 6, "stop_at": stop}
        resumed += global_order(run_ranks(ranks, samples_of, corpus, out, config_changes))
    assert resumed == orders[0]


def activation_run(corpus, out, config_changes):
    losses = losses_of(corpus, out, config_changes)
    assert all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_activation_checkpointing_changes_nothing(corpus, tmp_path, stage, precision):
    same = {"deepspeed__zero_stage": stage, "precision": precision, "sparsity__algorithm": "rigl",
            "model__dropout": 0.1}  # fmt: skip
    plain = run_ranks(2, activation_run, corpus, str(tmp_path / "plain"), same)
    config_changes = same | {"model__activation_checkpointing": True}
    assert run_ranks(2, activation_run, corpus, str(tmp_path / "less"), config_changes) == plain
    assert len(plain[0]) == 12 and plain[0] == plain[1]


@pytest.mark.parametrize("stage", [2, 3])
def test_document_attention_trains(corpus, tmp_path, stage):
    same = {"deepspeed__zero_stage": stage, "seq_len": 96, "max_steps": 15,
            "model__activation_checkpointing": True}  # fmt: skip
    full = run_ranks(2, activation_run, corpus, str(tmp_path / "full"), same)[0]
    config_changes = same | {"document_attention": True}
    stopped = run_ranks(2, activation_run, corpus, str(tmp_path / "stopped"), config_changes)[0]
    assert stopped[-1] < stopped[0] - 0.1
    assert stopped != full
    assert torch.tensor(stopped).allclose(torch.tensor(full), atol=0.2)
