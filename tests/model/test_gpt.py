"""The GPT itself: causality, document boundaries, initialisation, checkpointing."""

import math
from functools import partial

import pytest
import torch

from sparse_gpt.model.flops import linear_shapes
from sparse_gpt.model.gpt import GPT, GPTConfig, document_mask, draw_weight
from sparse_gpt.ops import KERNELS, BlockLayout, Growth, Pattern


def config(**changes) -> GPTConfig:
    dims = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32, "vocab_size": 29}
    return GPTConfig(**{**dims, "n_positions": 12, **changes})


def model(seed: int = 0, **changes) -> GPT:
    gpt = GPT(config(**changes))
    gpt.init_weights(seed)
    with torch.no_grad():  # larger than at the start, so that every path matters
        for parameter in gpt.parameters():
            parameter.mul_(8)
    return gpt


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 29, shape, generator=torch.Generator().manual_seed(1))


def test_no_position_sees_a_later_one():
    gpt, ids = model().eval(), tokens(2, 12)
    logits = gpt(ids)
    for position in range(12):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 29
        other = gpt(changed)
        assert torch.equal(other[:, :position], logits[:, :position])
        assert (other[:, position] - logits[:, position]).abs().max() > 1e-3


def test_every_earlier_position_is_seen():
    gpt = model().eval()
    embedded = gpt.wte(tokens(1, 12)).detach().requires_grad_()
    x = embedded + gpt.wpe(torch.arange(12))
    for block in gpt.h:
        x = block(x, None)
    # One channel of the last position: the sum over all would cancel in the LayerNorm.
    gpt.ln_f(x)[0, -1, 0].backward()
    assert embedded.grad is not None
    assert (embedded.grad[0].abs().amax(-1) > 0).all()


def test_a_document_is_read_as_if_alone():
    """Its logits are those of the document alone at the same positions."""
    gpt, ids = model().double().eval(), tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    packed = gpt(ids, document_ids=documents)
    for start, end in ((0, 5), (5, 9), (9, 12)):
        x = gpt.wte(ids[:, start:end]) + gpt.wpe(torch.arange(start, end))
        for block in gpt.h:
            x = block(x, None)
        alone = gpt.ln_f(x) @ gpt.wte.weight.T
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-10, atol=1e-10)
    assert (gpt(ids)[:, 5:] - packed[:, 5:]).abs().max() > 1e-3


def test_one_document_is_plain_causal_attention():
    gpt, ids = model().eval(), tokens(2, 12)
    packed = gpt(ids, document_ids=torch.zeros(2, 12, dtype=torch.int64))
    torch.testing.assert_close(packed, gpt(ids), rtol=1e-5, atol=1e-5)


def test_document_mask():
    mask = document_mask(torch.tensor([[3, 3, 7, 7, 7]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("documents", [None, torch.arange(12).div(5).long().expand(2, 12)])
def test_activation_checkpointing_changes_no_number(dropout, documents):
    results = []
    for checkpointing in (False, True):
        gpt = model(dropout=dropout, activation_checkpointing=checkpointing).train()
        for layer in gpt.sparse_layers().values():
            out, inner = layer.weight.shape
            generator = torch.Generator().manual_seed(out)
            active = torch.rand(out // 4, inner // 4, generator=generator) < 0.5
            layer.pattern = Pattern(active, (4, 4))
        torch.manual_seed(5)
        ids = tokens(2, 12)
        loss = gpt(ids, ids, document_ids=documents)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in gpt.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for first, second in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(first, second)


def test_no_checkpointing_in_evaluation(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr("sparse_gpt.model.gpt.checkpoint", fail)
    gpt = model(activation_checkpointing=True)
    gpt.eval()(tokens(1, 4))
    with pytest.raises(AssertionError, match="checkpointed"):
        gpt.train()(tokens(1, 4))


def test_initialisation_table():
    dims = {"n_layer": 3, "d_model": 128, "d_ff": 512, "vocab_size": 600, "n_positions": 200}
    gpt = GPT(config(**dims))
    gpt.init_weights(seed=7)
    # A normal cut at 2 sigma has 0.8796 of its spread.
    spread = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    assert spread == pytest.approx(0.8796, abs=1e-4)
    for name, parameter in gpt.named_parameters():
        values = parameter.detach()
        if name.endswith("bias"):
            assert torch.count_nonzero(values) == 0
        elif "ln_" in name:
            assert torch.equal(values, torch.ones(128))
        else:
            residual = name.endswith(("attn.o.weight", "mlp.fc2.weight"))
            std = 0.02 / math.sqrt(6) if residual else 0.02
            assert float(values.std()) == pytest.approx(std * spread, rel=0.03)
            assert abs(float(values.mean())) < 0.03 * std
            assert float(values.abs().max()) <= 2 * std * (1 + 1e-6)
            assert float(values.abs().max()) > 1.9 * std


def test_init_std_scales_all_of_it():
    ordinary, double = GPT(config()), GPT(config(init_std=0.04))
    ordinary.init_weights(0)
    double.init_weights(0)
    for first, second in zip(ordinary.parameters(), double.parameters(), strict=True):
        if first.dim() == 2:
            torch.testing.assert_close(second, 2 * first)


def test_initial_values_depend_on_seed_and_name_alone():
    first, second = GPT(config()), GPT(config())
    torch.manual_seed(1)
    first.init_weights(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second.init_weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
        if one.dim() == 2:
            std = 0.02 / math.sqrt(4) if name.endswith(("o.weight", "fc2.weight")) else 0.02
            assert torch.equal(one, draw_weight(3, name, tuple(one.shape), std))

    deeper = GPT(config(n_layer=5))
    deeper.init_weights(3)
    assert torch.equal(
        deeper.h[1].get_parameter("attn.k.weight"), first.h[1].get_parameter("attn.k.weight")
    )
    other = GPT(config())
    other.init_weights(4)
    assert not torch.equal(other.wte.weight, first.wte.weight)
    layers = [draw_weight(3, f"h.{n}.attn.q.weight", (16, 16), 0.02) for n in range(2)]
    assert not torch.equal(*layers)


def test_a_projected_embedding_is_two_linear_maps():
    gpt, ids = model(d_embed=6).eval(), tokens(2, 12)
    assert gpt.wte.weight.shape == (29, 6)
    assert gpt.project_in is not None
    assert gpt.project_out is not None
    x = gpt.wte.weight[ids] @ gpt.project_in.weight.T + gpt.wpe.weight[:12]
    for block in gpt.h:
        x = block(x, None)
    wide = gpt.ln_f(x)
    assert torch.equal(gpt.hidden(ids), wide)
    logits = wide @ gpt.project_out.weight.T @ gpt.wte.weight.T
    torch.testing.assert_close(gpt(ids), logits, rtol=1e-5, atol=1e-5)


def test_projections_through_the_identity_are_the_plain_model():
    plain, projected = model().eval(), model(d_embed=16).eval()
    assert projected.project_in is not None
    assert projected.project_out is not None
    with torch.no_grad():
        for projection in (projected.project_in, projected.project_out):
            projection.weight.copy_(torch.eye(16))
    ids = tokens(2, 12)
    assert torch.equal(projected(ids), plain(ids))


def test_projections_keep_the_scale_of_embeddings_and_logits():
    dims = {"n_layer": 1, "d_model": 768, "d_ff": 16, "vocab_size": 600, "n_positions": 8}
    scales = []
    for d_embed in (None, 256):
        gpt = GPT(config(**dims, d_embed=d_embed))
        gpt.init_weights(5)
        ids = torch.arange(8)[None]
        hidden = torch.randn(400, 768, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            embedded = gpt.wte(ids) if gpt.project_in is None else gpt.project_in(gpt.wte(ids))
            out = hidden if gpt.project_out is None else gpt.project_out(hidden)
        scales.append((float(embedded.std()), float(out.std())))
    spread = 0.8796  # of a normal cut at 2 sigma
    assert scales[1][0] == pytest.approx(spread * scales[0][0], rel=0.05)
    assert scales[1][1] == pytest.approx(spread * scales[0][1], rel=0.02)


def test_loss():
    gpt, ids = model().eval(), tokens(2, 12)
    targets = tokens(2, 12).roll(3)
    targets[0, :4] = -100
    logits = gpt(ids).double().log_softmax(-1)
    scored = [
        -float(logits[b, s, targets[b, s]].detach())
        for b in range(2)
        for s in range(12)
        if targets[b, s] >= 0
    ]
    assert len(scored) == 20
    assert float(gpt(ids, targets).detach()) == pytest.approx(sum(scored) / 20, rel=1e-6)
    assert float(gpt(ids, targets, reduction="sum").detach()) == pytest.approx(
        sum(scored), rel=1e-6
    )


def test_a_layer_without_a_pattern_is_nn_linear_and_a_full_one_equals_it():
    ids = tokens(2, 12)
    losses = []
    for block in (None, (1, 1), (4, 8)):
        for kernel in ("masked", "reference"):
            gpt = model()
            if block is not None:
                for layer in gpt.sparse_layers().values():
                    out, inner = layer.weight.shape
                    full = torch.ones(out // block[0], inner // block[1], dtype=torch.bool)
                    layer.pattern, layer.kernel = Pattern(full, block), KERNELS[kernel]
            loss = gpt(ids, ids)
            loss.backward()
            losses.append((loss.detach(), *(p.grad for p in gpt.parameters())))
    for other in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses[0], other, strict=True))


def test_the_sparse_layers_and_their_names():
    gpt = model()
    names = set(dict(gpt.named_parameters()))
    layers = gpt.sparse_layers()
    assert len(layers) == 12
    assert set(layers) < names
    for name, layer in layers.items():
        assert gpt.get_parameter(name) is layer.weight


def test_bad_dimensions():
    with pytest.raises(ValueError, match="d_model 16 is not divisible by n_head 3"):
        config(n_head=3)
    for width in (0, True, 6.0):
        with pytest.raises(ValueError, match=f"d_embed {width} is not a positive number"):
            config(d_embed=width)
    with pytest.raises(ValueError, match="13 tokens is longer than n_positions 12"):
        model()(tokens(1, 13))


@pytest.mark.slow
# torch's compiler imports parts of torch that use its deprecated torch.jit, instantiates autograd
# functions as it traces them, and looks at .grad of the hidden states between compiled blocks.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_compute_the_same_and_see_a_new_topology():
    plain, compiled = model().train(), model().train()
    for block in compiled.h:
        block.compile()
    ids, results = tokens(2, 12), []
    for remainder in range(2):
        for gpt in (plain, compiled):
            for layer in gpt.sparse_layers().values():
                out, inner = layer.weight.shape
                active = torch.arange(out * inner).view(out, inner) % 3 == remainder
                layer.pattern = Pattern(active)
                layer.dense_grad = remainder == 1
            gpt.zero_grad()
            loss = gpt(ids, ids)
            loss.backward()
            results.append((loss.detach(), [p.grad for p in gpt.parameters()]))
        expected, got = results[-2:]
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        for one, wanted in zip(got[1], expected[1], strict=True):
            assert one is not None and wanted is not None
            # k's bias has no gradient but rounding: softmax does not see it.
            scale = max(float(wanted.abs().max()), 1.0)
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5 * scale)
    assert abs(results[0][0] - results[2][0]) > 0.1


def compact_model(step: int, **changes) -> GPT:
    """A model in compact storage, with the topology of a step."""
    shapes = linear_shapes({"n_layer": 2, "d_model": 16, "d_ff": 32})
    layouts = {
        name: BlockLayout(shape, (2, 4), slots(shape, step)) for name, shape in shapes.items()
    }
    gpt = GPT(config(**changes), layouts)
    gpt.init_weights(seed=3)
    return gpt


def slots(shape: tuple[int, int], step: int) -> torch.Tensor:
    units = shape[0] * shape[1] // 8
    return torch.arange(units)[torch.arange(units) % 3 != step % 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_of_compact_layers_see_a_new_topology_and_give_growth_away():
    plain, compiled = compact_model(0).train(), compact_model(0).train()
    for block in compiled.h:
        block.compile()
    ids, losses = tokens(2, 12), []
    for step in range(3):
        found = []
        for gpt in (plain, compiled):
            norms = {}
            for name, layer in gpt.sparse_layers().items():
                layer.layout.rewrite(slots(layer.layout.shape, step)[: layer.layout.count])
                add = partial(norms.__setitem__, name)
                layer.growth = Growth("norms", lambda v, add=add: add(v.clone())) if step else None
            gpt.zero_grad()
            loss = gpt(ids, ids)
            loss.backward()
            found.append((loss.detach(), [p.grad for p in gpt.parameters()], norms))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        assert len(found[0][2]) == (12 if step else 0)
        losses.append(float(found[0][0]))
    assert len(set(losses)) == 3
