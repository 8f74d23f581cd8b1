"""Layers in the members' forms against plain products of masked weights, and inside a GPT."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from sparse_gpt.ift.forms import Transform, solve_size
from sparse_gpt.ift.layers import transformed_linear
from sparse_gpt.model.flops import linear_shapes, linear_weights
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import KERNELS, Pattern

OUT, IN = 10, 14
SIZES = {"parallel": 3, "factorized": 9, "doped": 2, "low_rank": 4}
SIGMA = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}
DIMS = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 40}


def config(transform=None, **changes):
    return GPTConfig(
        **{**DIMS, "vocab_size": 31, "n_positions": 12, "transform": transform, **changes}
    )


def everywhere(member, sparsity, non_linearity="identity"):
    """A transform of every layer."""
    shapes = config().layer_shapes.items()
    sizes = {layer: solve_size(member, sparsity, shape) for layer, shape in shapes}
    return Transform(member, non_linearity, sizes)


def reference(member, non_linearity, weights, bias, x):
    """The form written out over whole (masked) matrices."""
    sigma = SIGMA[non_linearity]
    if member == "parallel":
        branches = [sigma(x @ w.T) for name, w in weights.items() if name.startswith("branch")]
        return torch.stack(branches).sum(0) + bias
    if member == "doped":
        low_rank = x @ weights["u.weight"].T @ weights["v.weight"].T
        return low_rank + sigma(x @ weights["sparse.weight"].T) + bias
    return sigma(x @ weights["u.weight"].T) @ weights["v.weight"].T + bias


@pytest.mark.parametrize("kernel", ["masked", "reference"])
@pytest.mark.parametrize("non_linearity", SIGMA)
@pytest.mark.parametrize("member", SIZES)
def test_forward_and_gradients(member, non_linearity, kernel):
    torch.manual_seed(0)
    layer = transformed_linear(member, SIZES[member], (OUT, IN), non_linearity).double()
    masks = {}
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter)
        part = layer.get_submodule(name.rpartition(".")[0])
        masks[name] = torch.ones_like(parameter)
        if isinstance(part, SparseLinear):
            active = torch.rand(parameter.shape) < 0.5
            part.pattern, part.kernel = Pattern(active), KERNELS[kernel]
            masks[name] = active.double()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    copies = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x2 = x.detach().clone().requires_grad_()
    masked = {name: copy * masks[name] for name, copy in copies.items()}
    expected = reference(member, non_linearity, masked, masked["bias"], x2)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, copies[name].grad, msg=name)
    sparse = sum(isinstance(part, SparseLinear) for part in layer.modules())
    assert sparse == {"parallel": 3, "factorized": 2, "doped": 1, "low_rank": 0}[member]


@pytest.mark.parametrize("non_linearity", ["relu", "gelu"])
def test_doped_without_a_low_rank_part(non_linearity):
    layer = transformed_linear("doped", 0, (OUT, IN), non_linearity).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = SIGMA[non_linearity](x @ layer.sparse.weight.T) + layer.bias
    torch.testing.assert_close(layer(x), expected)


def gpt(transform=None, seed=7):
    model = GPT(config(transform))
    model.init_weights(seed)
    return model


def losses_and_gradients(model):
    ids = torch.arange(24).view(2, 12) % 31
    loss = model(ids, ids)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("member", ["parallel", "doped"])
def test_no_sparsity_is_the_dense_model_bit_for_bit(member):
    loss, gradients = losses_and_gradients(gpt())
    other, theirs = losses_and_gradients(gpt(everywhere(member, 0.0)))
    assert torch.equal(loss, other)
    part = {"parallel": "branch.0", "doped": "sparse"}[member]
    renamed = {name.replace(f".{part}.", "."): g for name, g in theirs.items()}
    assert renamed.keys() == gradients.keys()
    assert all(torch.equal(gradients[name], renamed[name]) for name in gradients)


def test_factorized_without_sparsity_is_a_dense_factorization():
    model = gpt(everywhere("factorized", 0.0))
    assert model.h[0].attn.q.u.weight.shape == (8, 16)  # 16 * 16 / 32
    assert model.h[0].mlp.fc1.v.weight.shape == (40, 11)  # 640 / 56 = 11.4


@pytest.mark.parametrize("member", SIZES)
def test_the_module_and_the_ledger_have_the_same_weights(member):
    transform = everywhere(member, 0.0 if member == "low_rank" else 0.6, "relu")
    model = gpt(transform)
    weights = linear_weights(DIMS, transform)
    shapes = {name: tuple(layer.weight.shape) for name, layer in model.sparse_layers().items()}
    assert shapes == linear_shapes(DIMS, transform)
    matrices = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if name.startswith("h.") and name.endswith(".weight") and ".ln_" not in name
    }
    assert matrices == {name: weight.shape for name, weight in weights.items()}


def test_layers_that_are_not_named_are_plain():
    transform = Transform("factorized", "relu", {"h.1.mlp.fc1": 5})
    plain, model = gpt(), gpt(transform)
    ours = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name != "h.1.mlp.fc1.weight":
            assert torch.equal(parameter, ours.pop(name))
    assert set(ours) == {"h.1.mlp.fc1.u.weight", "h.1.mlp.fc1.v.weight"}
    with pytest.raises(ValueError, match=r"h\.2\.attn\.q is not a layer"):
        config(Transform("doped", "relu", {"h.2.attn.q": 1}))


@pytest.mark.parametrize("member", SIZES)
def test_initial_outputs_have_the_dense_layers_variance(member):
    """With sigma = identity and masks at the sparsity of the sizes."""
    s, shape = 0.0 if member == "low_rank" else 0.75, (256, 192)
    dims = {"n_layer": 1, "n_head": 1, "d_model": 192, "d_ff": 256}
    size = solve_size(member, s, shape)
    transform = Transform(member, "identity", {"h.0.mlp.fc1": size})
    variances = []
    x = torch.randn(400, 192, generator=torch.Generator().manual_seed(1))
    for made in (None, transform):
        model = GPT(GPTConfig(**dims, vocab_size=9, n_positions=4, transform=made))
        model.init_weights(3)
        layer = model.h[0].mlp.fc1
        torch.manual_seed(2)
        for part in layer.modules():
            if isinstance(part, SparseLinear) and made is not None:
                part.weight.data *= torch.rand(part.weight.shape) >= s
        variances.append(float(layer(x).detach().var()))
    assert variances[1] == pytest.approx(variances[0], rel=0.05)


def test_residual_layers_start_smaller():
    model = GPT(config(everywhere("factorized", 0.5), n_layer=2, d_model=64, d_ff=256))
    model.init_weights(0)
    attn = model.h[0].attn
    ratio = attn.o.u.weight.detach().std() / attn.q.u.weight.detach().std()
    assert float(ratio) == pytest.approx(4**-0.25, rel=0.05)  # (1 / sqrt(2 n_layer))^(1/2)


@pytest.mark.parametrize("member", [None, *SIZES])
def test_a_config_goes_through_json(member):
    made = config(None if member is None else everywhere(member, 0.0), activation="gelu_new")
    tree = json.loads(json.dumps(dataclasses.asdict(made)))
    assert GPTConfig.from_dict(tree) == made
    assert ("transform" in tree) and GPTConfig.from_dict(tree).transform == made.transform


def test_configs_of_older_checkpoints_and_broken_ones():
    tree = dataclasses.asdict(config())
    del tree["transform"]
    assert GPTConfig.from_dict(tree) == config()
    for broken in ({**tree, "width": 1}, {k: v for k, v in tree.items() if k != "d_ff"}):
        with pytest.raises(ValueError, match="has not the keys"):
            GPTConfig.from_dict(broken)
