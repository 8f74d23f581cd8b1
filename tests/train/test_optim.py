"""Learning rate, parameter groups, and the optimizer that can be held."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.config import OptimizerConfig, ScheduleConfig
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.train.optim import (
    AdamW,
    build_optimizer,
    learning_rate,
    optimizer_steps,
    parameter_groups,
    prime_optimizer,
    set_optimizer_steps,
)


def rates(kind, warmup, total, **more):
    config = ScheduleConfig(type=kind, **more)
    return [learning_rate(config, 2.0, step, warmup, total) for step in range(1, total + 1)]


def test_the_authors_cosine():
    """FACTS section 4: 716 steps of warmup, cosine to 10 % at step 4,778."""
    lr = [math.nan, *rates("cosine", 716, 4778)]
    assert lr[1] == pytest.approx(2.0 / 716)
    assert lr[358] == pytest.approx(1.0)
    assert lr[716] == 2.0
    assert lr[716 + 2031] == pytest.approx(1.1)  # half way down
    assert lr[4778] == pytest.approx(0.2, rel=1e-12)
    assert max(lr[1:]) == 2.0


def test_linear_and_constant():
    assert rates("linear", 2, 10)[1:] == pytest.approx([2.0 - 1.8 * i / 8 for i in range(9)])
    assert rates("constant", 2, 5) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_wsd_holds_then_decays_over_the_last_share():
    lr = rates("wsd", 5, 50, decay_fraction=0.2)
    assert lr[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert lr[4:40] == [2.0] * 36
    assert lr[40:] == pytest.approx([2.0 - 0.18 * i for i in range(1, 11)])
    assert lr[-1] == pytest.approx(0.2)


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(0, 40),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_every_schedule_rises_then_never_rises_again(kind, warmup, decay, low):
    total = warmup + decay
    lr = rates(kind, warmup, total, min_lr_ratio=low, decay_fraction=0.3)
    peak = max(0, warmup - 1)
    assert all(a < b for a, b in pairwise(lr[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(lr[peak:]))
    assert all(0 <= value <= 2.0 + 1e-12 for value in lr)
    if kind != "constant":
        assert lr[-1] == pytest.approx(2.0 * low, abs=1e-12)


def test_no_warmup_starts_at_the_schedule():
    assert rates("constant", 0, 3) == [2.0, 2.0, 2.0]
    assert rates("linear", 0, 1, min_lr_ratio=0.5) == [1.0]


def small_model() -> GPT:
    model = GPT(GPTConfig(2, 2, 8, 16, vocab_size=11, n_positions=6))
    model.init_weights(1)
    return model


def test_every_parameter_is_in_one_group():
    model = small_model()
    decay, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(p)] for p in decay["params"]}
    kinds = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2")
    assert decaying == {f"h.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert {names[id(p)] for p in plain["params"]} == set(names.values()) - decaying
    assert len(decay["params"]) + len(plain["params"]) == len(names)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_projections_decay_as_linear_weights_do():
    model = GPT(GPTConfig(1, 2, 8, 16, vocab_size=11, n_positions=6, d_embed=4))
    decay, _ = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decay["params"][:2]] == [(8, 4), (4, 8)]
    assert len(decay["params"]) == 8


def test_a_held_step_changes_nothing_and_the_next_is_a_normal_one():
    def run(holds):
        torch.manual_seed(3)
        parameter = torch.nn.Parameter(torch.randn(20))
        optimizer = AdamW([parameter], lr=0.1, weight_decay=0.3)
        for hold in holds:
            parameter.grad = torch.sin(parameter.detach())
            before = parameter.detach().clone()
            state = {k: v.clone() for k, v in optimizer.state[parameter].items()}
            optimizer.hold = hold
            optimizer.step()
            if hold:
                assert torch.equal(parameter, before)
                for key, value in state.items():
                    assert torch.equal(optimizer.state[parameter][key], value)
            else:
                assert not torch.equal(parameter, before)
        return parameter.detach()

    assert torch.equal(run([False, True, False, True, True, False]), run([False] * 3))


def test_the_optimizer_starts_primed_at_step_zero():
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, betas=(0.8, 0.9), eps=1e-6))
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)  # set before every step
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    prime_optimizer(optimizer, model.parameters())
    assert optimizer_steps(optimizer) == 0
    set_optimizer_steps(optimizer, 41)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer_steps(optimizer) == 42
    assert all(state["exp_avg"].any() for state in optimizer.state.values())
