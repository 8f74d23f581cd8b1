"""Sparse Wide networks: consistent widths, each layer's FLOPs, and what cannot be widened."""

import pytest
import torch
from torch import nn

from sparse_gpt.errors import UserError
from sparse_gpt.ift.masked import MaskedConv2d, MaskedLinear, count_flops
from sparse_gpt.ift.surgery_wide import wide_layer, widen, widen_low_rank
from tests.ift.networks import Separable, SmallResNet, images


def network(kind=SmallResNet, **options):
    torch.manual_seed(0)
    return kind(**options)


@pytest.mark.parametrize(
    ("sparsity", "widths"), [(0.5, (11, 23)), (0.75, (16, 32)), (0.9, (25, 51))]
)
def test_a_residual_network(sparsity, widths):
    model = network()
    dense = count_flops(model, images(1))
    report = widen(model, sparsity, images(1))
    w1, w2 = widths
    shapes = {r.name: tuple(model.get_submodule(r.name).weight.shape) for r in report.layers}
    assert shapes == {
        "conv1": (w1, 3, 3, 3),
        "layer1.conv1": (w1, w1, 3, 3),
        "layer1.conv2": (w1, w1, 3, 3),
        "layer2.conv1": (w2, w1, 3, 3),
        "layer2.conv2": (w2, w2, 3, 3),
        "layer2.shortcut.0": (w2, w1, 1, 1),
        "fc": (5, w2),
    }
    assert count_flops(model, images(1)) == dense
    for r in report.layers:
        mask = model.get_submodule(r.name).mask
        assert r.macs == r.base_macs == int(mask.sum()) and r.weights == mask.numel()
    inside = [r for r in report.layers if r.name not in ("conv1", "fc")]
    share = sum(r.macs for r in inside) / sum(r.weights for r in inside)
    assert share == pytest.approx(1 - sparsity, rel=0.1)  # widths are whole numbers


def test_forward_and_backward_against_plain_layers():
    model = network().double()
    widen(model, 0.75, images(1).double())
    plain = network().double()
    for name, part in list(model.named_modules()):
        if isinstance(part, MaskedConv2d | MaskedLinear | nn.BatchNorm2d):
            if isinstance(part, MaskedConv2d):
                other = nn.Conv2d(
                    part.in_channels, part.out_channels, part.kernel_size, part.stride,
                    part.padding, bias=part.bias is not None,
                )  # fmt: skip
            elif isinstance(part, MaskedLinear):
                other = nn.Linear(part.in_features, part.out_features)
            else:
                other = nn.BatchNorm2d(part.num_features)
            state = {k: v for k, v in part.state_dict().items() if k != "mask"}
            if hasattr(part, "mask"):
                state["weight"] = state["weight"] * part.mask
            other.double().load_state_dict(state)
            parent, _, key = name.rpartition(".")
            setattr(plain.get_submodule(parent), key, other)
    for net in (model, plain):
        net(images().double()).square().sum().backward()
    torch.testing.assert_close(model(images().double()), plain(images().double()))
    for name, parameter in model.named_parameters():
        expected = plain.get_parameter(name).grad
        part = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and hasattr(part, "mask"):
            expected = expected * part.mask
        torch.testing.assert_close(parameter.grad, expected, msg=name)


def test_no_sparsity_changes_nothing():
    model = network()
    layers = list(model.modules())
    report = widen(model, 0.0, images(1))
    assert [a is b for a, b in zip(layers, model.modules(), strict=True)] == [True] * len(layers)
    assert all(r.macs == r.weights for r in report.layers)


def test_depthwise_channels_follow_their_neighbours():
    model = network(Separable)
    dense = count_flops(model, images(1))
    report = {r.name: r for r in widen(model, 0.75, images(1)).layers}
    assert model.depthwise.weight.shape == (48, 1, 3, 3) and model.depthwise.groups == 48
    assert report["depthwise"].macs == 24 * 9 and report["depthwise"].weights == 48 * 9
    assert count_flops(model, images(1)) == dense


def test_a_dense_layer_is_widened_only():
    model = network()
    report = {r.name: r for r in widen(model, 0.75, images(1), keep_dense=["layer1.*"]).layers}
    assert model.layer1.conv1.mask is None and report["layer1.conv1"].macs == 16 * 16 * 9
    assert model.layer2.conv1.mask is not None


def test_initial_state_of_norms_and_biases():
    model = network()
    nn.init.zeros_(model.layer1.bn2.weight)
    nn.init.constant_(model.fc.bias, 0.5)
    model.bn1.eval()
    widen(model, 0.75, images(1), seed=3)
    assert not model.layer1.bn2.weight.any() and model.layer1.bn1.weight.eq(1).all()
    assert model.fc.bias.eq(0.5).all() and not model.bn1.training and model.layer1.bn1.training
    assert int(model.bn1.num_batches_tracked) == 0
    again = network()
    widen(again, 0.75, images(1), seed=3)
    assert torch.equal(again.layer2.conv1.weight, model.layer2.conv1.weight)


class Joined(nn.Module):
    """Two branches of 3 channels, concatenated."""

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.c = nn.Linear(6 * 64, 5) if flatten else nn.Conv2d(6, 5, 1)

    def forward(self, x):
        y = torch.cat([self.a(x), self.b(x)], 1)
        return self.c(y.flatten(1) if self.flatten else y)


def test_ends_by_name_and_widths_that_are_joined():
    model = network(Joined)
    before = [*model.modules()], [*model.state_dict().values()]
    with pytest.raises(UserError, match=r"does not fit together .*name the layers that take"):
        widen(model, 0.75, images(1))  # b takes the inputs too
    assert all(a is b for a, b in zip(before[0], model.modules(), strict=True))
    assert all(map(torch.equal, before[1], model.state_dict().values()))
    widen(model, 0.75, images(1), first=["a", "b"])
    assert model.c.weight.shape == (5, 12, 1, 1)
    with pytest.raises(UserError, match="does not fit together"):
        widen(network(Joined), 0.9, images(1), first=["a", "b"])  # 9 and 9 channels, not 19
    with pytest.raises(UserError, match="first: 'd' is no linear layer"):
        widen(network(Joined), 0.5, images(1), first=["d"])


def test_what_cannot_be_widened():
    with pytest.raises(UserError, match=r"3 groups cannot be widened"):
        widen(network(Separable, groups=3), 0.5, images(1))
    with pytest.raises(UserError, match=r"0: weight of a Embedding has no rule"):
        widen(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), 0.5, torch.tensor([1]))
    with pytest.raises(UserError, match=r"4 groups do not divide the width 34; set multiple_of: 4"):
        widen(network(Separable), 0.5, images(1))
    widen(network(Separable), 0.5, images(1), multiple_of=4)
    with pytest.raises(UserError, match=r"LayerNorm over \(8, 8\)"):
        widen(nn.Sequential(nn.LayerNorm((8, 8)), nn.Conv2d(3, 3, 1)), 0.5, images(1))
    with pytest.raises(UserError, match=r"sparsity 1.0 is not in \[0, 1\)"):
        widen(network(), 1.0, images(1))
    idle = nn.Sequential(nn.ReLU())
    idle[0].add_module("unused", nn.Linear(3, 3))
    with pytest.raises(UserError, match="ran no linear layer"):
        widen(idle, 0.5, images(1))


@pytest.mark.parametrize("k_lr", [1.0, 1.41, 2.0])
def test_low_rank_at_every_width(k_lr):
    """App. C.3.3 and Table 10's widths: the dense network's FLOPs to the rounding of the ranks."""
    model = network()
    report = widen_low_rank(
        model, k_lr, images(1), non_linearity="batchnorm_relu", keep_dense=["fc"]
    )
    assert model.layer2.conv2.v.weight.shape[0] == round(16 * k_lr)
    assert model(images()).shape == (3, 5)
    for r in report.layers[:-1]:
        made = model.get_submodule(r.name)
        rows, inner = made.v.weight.shape[0], made.u.weight[0].numel()
        assert made.u.mask is None and made.u.weight.shape[0] == r.size
        assert r.macs == r.size * (rows + inner)
        assert r.size == 1 or abs(r.macs - r.base_macs) <= (rows + inner) / 2
    dense = report.layers[-1]
    assert (dense.member, dense.size, dense.macs) == ("wide", None, 5 * round(16 * k_lr))


def test_low_rank_leaves_depthwise_convolutions_their_form():
    model = network(Separable)
    report = {r.name: r for r in widen_low_rank(model, 2.0, images(1)).layers}
    assert report["depthwise"].member == "wide" and model.depthwise.mask is None
    with pytest.raises(UserError, match=r"k_lr 0\.5 is not 1 or more"):
        widen_low_rank(model, 0.5, images(1))


def test_one_layer():
    made, report = wide_layer("fc", nn.Linear(30, 60), 0.75)
    assert made.weight.shape == (120, 60) and int(made.mask.sum()) == 1800 == report.macs


@pytest.mark.parametrize(("sparsity", "factor"), [(0.5, 2), (0.75, 4), (0.9, 10)])
def test_the_papers_depthwise_form(sparsity, factor):
    """App. A.1.1: outputs only, by 1 / (1 - s)."""
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    made, report = wide_layer("d", layer, sparsity)
    assert made.weight.shape == (6 * factor, 1, 3, 3) and made.groups == made.in_channels == 6
    assert int(made.mask.sum()) == report.macs == 54
    assert made(torch.zeros(1, 6, 4, 4)).shape == (1, 6 * factor, 4, 4)
    assert wide_layer("d", nn.Conv2d(6, 12, 3, groups=6), 0.5)[0].weight.shape == (24, 1, 3, 3)
    with pytest.raises(UserError, match="d: 3 groups cannot be widened"):
        wide_layer("d", nn.Conv2d(6, 6, 3, groups=3), sparsity)
