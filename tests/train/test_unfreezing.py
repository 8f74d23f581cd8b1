"""Gradual unfreezing: what moves in each phase, by whose step count, and through a resume."""

import pytest
import torch

from sparse_gpt.errors import UserError
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.train.optim import steps_by_phase
from sparse_gpt.train.unfreezing import phase_at, phase_of
from tests.contracts.runs import after_every_step, assemble, run_config, trainer
from tests.contracts.test_resume import train
from tests.ranks import run_ranks
from tests.tiny import write_corpus

EVERY, PHASES = 3, 4  # of two blocks
GRADUAL = {
    "unfreezing": {"every": EVERY},
    "max_steps": EVERY * PHASES,
    "sparsity": {"sparsity": 0.75, "algorithm": "static"},
    "schedule": {"type": "linear", "min_lr_ratio": 0.0},
    "optimizer__weight_decay": 0.5,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 30, 4))


def test_every_parameter_has_its_phase():
    gpt = GPT(GPTConfig(3, 2, 16, 40, vocab_size=17, n_positions=8, d_embed=8))
    begins = {name: phase_of(name, 3, "head") for name, _ in gpt.named_parameters()}
    assert {name for name in begins if name.startswith("h.2.") and begins[name] == 1} == {
        f"h.2.{layer}.weight"
        for layer in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2")
    }
    assert (begins["h.1.mlp.fc1.weight"], begins["h.0.attn.q.weight"]) == (2, 3)
    assert {begins[n] for n in begins if "bias" in n or "ln_" in n} == {0}
    assert begins["wte.weight"] == begins["project_out.weight"] == 0
    assert begins["wpe.weight"] == begins["project_in.weight"] == 4
    assert phase_of("wte.weight", 3, "embedding") == 4
    assert [phase_at(step, 2, 1) for step in range(1, 9)] == [0, 0, 1, 1, 2, 2, 2, 2]


def watch(corpus, out, changes):
    """By step: lr, the norm clipped by, and what moved how far; then Adam's steps by phase."""
    seen = []
    with trainer(run_config(corpus, out, **changes)) as made:
        n_layer = made.gpt_config.n_layer
        tied = made.config.unfreezing.tied_embedding

        def whole():
            tensors = {name: fragment.tensors() for name, fragment in made.shards.fragments()}
            return {
                name: torch.stack([assemble(made, name, part) for part in parts.values()])
                for name, parts in tensors.items()
            }

        last = [whole()]

        def look(step, health, update):
            now, moved = whole(), {}
            for name, tensors in now.items():
                if not torch.equal(tensors, last[0][name]):
                    moved[name] = (tensors[0] - last[0][name][0]).abs().max().item()
            begun = {n for n in now if phase_of(n, n_layer, tied) <= phase_at(step, EVERY, n_layer)}
            lr = made.optimizer.param_groups[0]["lr"]
            seen.append((lr, health.grad_norm, moved, begun))
            last[0] = now

        after_every_step(made, look)
        made.fit()
        return seen, steps_by_phase(made.optimizer)


@pytest.mark.parametrize("tied", ["head", "embedding"])
def test_only_what_has_begun_moves(corpus, tmp_path, tied):
    changes = GRADUAL | {"unfreezing": {"every": EVERY, "tied_embedding": tied}}
    changes |= {"optimizer__grad_clip": 0.0}
    seen, steps = run_ranks(1, watch, corpus, str(tmp_path / "run"), changes)[0]
    assert steps == [12, 9, 6, 3]
    begun_before = set()
    for index, (lr, norm, moved, begun) in enumerate(seen):
        place = index % EVERY
        assert lr == pytest.approx(2e-3 * (1 - (place + 1) / EVERY))
        assert norm > 0
        if lr == 0.0:
            continue  # moments move, weights do not
        assert moved.keys() == begun, index
        if place == 0:  # Adam's first step is lr, whatever the gradient, if its count is 1
            for name in begun - begun_before:
                if name.endswith("k.bias"):
                    continue  # softmax does not see it: its gradient is rounding
                decayed = lr * 0.5 * 0.25 * name.endswith("weight")
                assert 0.9 * lr < moved[name] < 1.001 * lr + decayed, (index, name)
        begun_before = begun
    assert len(seen) == EVERY * PHASES


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (2, "fp32", "none"),
        pytest.param(0, "fp32", "none", marks=pytest.mark.slow),
        pytest.param(1, "fp32", "none", marks=pytest.mark.slow),
        pytest.param(1, "bf16", "none", marks=pytest.mark.slow),
        pytest.param(2, "bf16", "none", marks=pytest.mark.slow),
        pytest.param(2, "fp32", "cpu", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(corpus, tmp_path, stage, precision, offload):
    changes = GRADUAL | {
        "deepspeed__zero_stage": stage,
        "deepspeed__offload_optimizer": offload,
        "precision": precision,
        "model__dropout": 0.1,
    }
    whole = run_ranks(2, train, corpus, str(tmp_path / "whole"), changes)
    parts = [[], []]
    for stop in (4, 9, EVERY * PHASES):
        session = {**changes, "stop_at": stop}
        for part, seen in zip(parts, run_ranks(2, train, corpus, str(tmp_path / "parts"), session)):
            part += seen
    assert parts == whole
    assert len(whole[0]) == EVERY * PHASES


def test_another_layout_goes_on_with_the_steps_of_each_phase(corpus, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(2, train, corpus, out, GRADUAL | {"stop_at": 7})
    changes = GRADUAL | {"deepspeed__zero_stage": 0}
    seen, steps = run_ranks(1, watch, corpus, out, changes)[0]
    assert (len(seen), steps) == (5, [12, 9, 6, 3])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepspeed__zero_stage": 3}, "set deepspeed.zero_stage: 2 or lower"),
        ({"sparsity__algorithm": "set"}, "set sparsity.algorithm: static or leave unfreezing out"),
    ],
)
def test_what_cannot_be_unfrozen(changes, said):
    changes = GRADUAL | {"sparsity": {"sparsity": 0.75, "algorithm": "static"}} | changes
    with pytest.raises(UserError, match=said):
        run_config("corpus", "out", **changes)
