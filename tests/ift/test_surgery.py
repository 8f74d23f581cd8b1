"""Members on networks of convolutions, against masked products of unfolded images."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_gpt.errors import UserError
from sparse_gpt.ift.forms import layer_weights, solve_size, solve_units
from sparse_gpt.ift.layers import TransformedLayer
from sparse_gpt.ift.masked import count_flops, random_mask
from sparse_gpt.ift.surgery import transform
from tests.ift.networks import Separable, SmallResNet, images

MEMBERS = ("parallel", "factorized", "doped", "low_rank")
SIGMA = {"identity": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def network(kind=SmallResNet, seed=0, **options):
    torch.manual_seed(seed)
    return kind(**options)


class Unfolded(nn.Module):
    """A transformed layer as products of masked matrices with unfolded images (App. A.1)."""

    def __init__(
        self, made: TransformedLayer, original: nn.Module, member: str, sigma: str
    ) -> None:
        super().__init__()
        self.member, self.sigma, self.original = member, SIGMA[sigma], [original]
        weights, self.masks = {}, {}
        for name, part in made.named_modules():
            if hasattr(part, "weight"):
                key = name.replace(".", "_")
                weights[key] = nn.Parameter(part.weight.detach().clone())
                mask = part.mask
                self.masks[key] = torch.ones_like(part.weight) if mask is None else mask
        self.weights = nn.ParameterDict(weights)
        self.bias = None if made.bias is None else nn.Parameter(made.bias.detach().clone())

    def matrix(self, key):
        return (self.weights[key] * self.masks[key]).flatten(1)

    def forward(self, x):
        (layer,) = self.original
        rows = x
        if isinstance(layer, nn.Conv2d):
            rows = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
        if self.member == "parallel":
            y = sum(self.sigma(rows @ self.matrix(key).T) for key in self.weights)
        elif self.member == "doped":
            y = rows @ self.matrix("u").T @ self.matrix("v").T
            y = y + self.sigma(rows @ self.matrix("sparse").T)
        else:
            y = self.sigma(rows @ self.matrix("u").T) @ self.matrix("v").T
        y = y if self.bias is None else y + self.bias
        if not isinstance(layer, nn.Conv2d):
            return y
        side = (x.shape[-1] - 1) // layer.stride[0] + 1
        return y.mT.unflatten(2, (side, side))


def put(module, name, part):
    parent, _, key = name.rpartition(".")
    setattr(module.get_submodule(parent), key, part)


@pytest.mark.parametrize("non_linearity", SIGMA)
@pytest.mark.parametrize("member", MEMBERS)
def test_forward_and_backward(member, non_linearity):
    model = network().double()
    original = copy.deepcopy(model)
    report = transform(
        model, member, 0.0 if member == "low_rank" else 0.5, non_linearity=non_linearity
    )
    reference = copy.deepcopy(model)
    for entry in report.layers:
        assert entry.member == member
        made, layer = (m.get_submodule(entry.name) for m in (model, original))
        put(reference, entry.name, Unfolded(made, layer, member, non_linearity))
    results = []
    for network_ in (model, reference):
        x = images().double().requires_grad_()
        network_(x).square().sum().backward()
        results.append((network_(x).detach(), x.grad))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)
    for entry in report.layers:
        ours = dict(model.get_submodule(entry.name).named_parameters())
        plain = reference.get_submodule(entry.name)
        for key, parameter in plain.weights.items():
            gradient = ours[f"{key.replace('_', '.')}.weight"].grad
            torch.testing.assert_close(gradient, parameter.grad, msg=f"{entry.name}.{key}")
            assert not gradient[plain.masks[key] == 0].any()


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_flops_are_the_dense_networks(member, sparsity):
    model = network()
    dense = count_flops(model, images(1))
    macs = {
        "conv1": 8 * 27 * 64,
        "layer1": 2 * 8 * 72 * 64,
        "layer2": (16 * 72 + 16 * 144 + 16 * 8) * 16,
        "fc": 80,
    }
    assert dense == 2 * sum(macs.values())
    report = transform(model, member, sparsity, keep_dense=["conv1", "fc"])
    assert count_flops(model, images(1)) == dense
    assert [r.member for r in report.layers] == ["dense", *[member] * 5, "dense"]
    assert all(r.macs == r.base_macs for r in report.layers)
    assert "layer1.conv2" in str(report) and "not chosen" in str(report)


def test_low_rank_flops_are_near():
    model = network()
    dense = count_flops(model, images(1))
    report = transform(model, "low_rank", 0.0, keep_dense=["fc"])
    assert count_flops(model, images(1)) == pytest.approx(dense, rel=0.05)
    for r in report.layers[:-1]:
        assert abs(r.macs - r.base_macs) <= r.macs / r.size / 2


@pytest.mark.parametrize("member", ["parallel", "doped"])
def test_no_sparsity_is_the_dense_network_bit_for_bit(member):
    model = network()
    changed = copy.deepcopy(model)
    transform(changed, member, 0.0, non_linearity="identity")
    outputs = []
    for net in (model, changed):
        x = images().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        outputs.append([y.detach(), x.grad, *gradients])
    first, second = outputs
    assert len(first) == len(second)
    for one in first:
        assert any(one.shape == other.shape and torch.equal(one, other) for other in second)


def test_masks_are_exact_and_a_function_of_seed_and_name():
    changed = [network(), network(), network()]
    transform(changed[0], "factorized", 0.75)
    transform(changed[1], "factorized", 0.75, filter=["layer2.conv1"])
    transform(changed[2], "factorized", 0.75, seed=1)
    masks = [m.layer2.conv1.u.mask for m in changed]
    shape = (16, 72)
    size = solve_size("factorized", 0.75, shape)
    units = solve_units(layer_weights("factorized", size, shape), 16 * 72)
    assert int(masks[0].sum()) == units["u.weight"]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(changed[0].layer2.conv1.u.weight, changed[1].layer2.conv1.u.weight)
    assert not torch.equal(changed[0].layer1.conv1.u.mask, changed[0].layer1.conv2.u.mask)
    state = changed[0].state_dict()
    other = network(seed=5)
    transform(other, "factorized", 0.75, seed=2)
    other.load_state_dict(state)
    x = images()
    assert torch.equal(other.eval()(x), changed[0].eval()(x))


def test_blocks():
    model = network()
    report = transform(model, "parallel", 0.5, block=(4, 2), filter=["layer1.*"])
    mask = model.layer1.conv1.branch[1].mask.flatten(1)
    tiles = mask.view(2, 4, 36, 2).sum((1, 3))
    assert set(tiles.unique().tolist()) == {0, 8} and int(mask.sum()) == 8 * 36
    assert [r.macs for r in report.layers if r.member == "parallel"] == [8 * 72, 8 * 72]
    with pytest.raises(UserError, match=r"does not divide conv1.branch.0.weight of \(8, 27\)"):
        transform(network(), "parallel", 0.5, block=(4, 2))
    assert random_mask(0, "w", (4, 6), 2, (2, 3)).view(2, 2, 2, 3).sum((1, 3)).sum() == 12


def test_training_leaves_the_masks_alone():
    model = network()
    transform(model, "doped", 0.75, non_linearity="batchnorm_relu", keep_dense=["fc"])
    assert isinstance(model.layer1.conv1.sigma[0], nn.BatchNorm2d)
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("mask")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images(6)), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    weight, mask = model.layer1.conv1.sparse.weight, model.layer1.conv1.sparse.mask
    assert not weight[~mask].any() and weight[mask].all()
    assert all(torch.equal(mask, before[n]) for n, mask in model.named_buffers() if n in before)


@pytest.mark.parametrize("member", MEMBERS)
def test_depthwise_convolutions_stay_dense(member):
    model = network(Separable)
    depthwise = model.depthwise
    sparsity = 0.0 if member == "low_rank" else 0.5
    report = {r.name: r for r in transform(model, member, sparsity).layers}
    assert model.depthwise is depthwise and "App. A.1.1" in report["depthwise"].reason
    assert report["expand"].member == report["head"].member == member
    assert model(images()).shape == (3, 5)


def test_grouped_convolutions_have_branches_alone():
    model = network(Separable, groups=3)
    dense = count_flops(model, images(1))
    report = {r.name: r for r in transform(model, "parallel", 0.5).layers}
    assert report["depthwise"].size == 2 and count_flops(model, images(1)) == dense
    report = {r.name: r for r in transform(network(Separable, groups=3), "doped", 0.5).layers}
    assert report["depthwise"].reason == "3 groups, whose factors would mix them"


def test_each_layer_stays_in_its_mode():
    model = network()
    model.layer1.eval()
    transform(model, "parallel", 0.5, non_linearity="batchnorm_relu", keep_dense=["fc"])
    assert not model.layer1.conv1.sigma[0][0].training and model.conv1.sigma[0][0].training


def test_new_weights_have_the_scale_of_the_layers_own():
    model = nn.Sequential(nn.Linear(400, 300))
    nn.init.normal_(model[0].weight, std=0.05)
    x = torch.randn(500, 400, generator=torch.Generator().manual_seed(3))
    expected = float(model(x).detach().var())
    for member in MEMBERS:
        changed = copy.deepcopy(model)
        sparsity = 0.0 if member == "low_rank" else 0.75
        transform(changed, member, sparsity, non_linearity="identity")
        assert float(changed(x).detach().var()) == pytest.approx(expected, rel=0.06), member


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.a(self.embed(ids)))


def test_shared_weights_are_refused_unless_dense():
    with pytest.raises(UserError, match=r"head\.weight is embed\.weight too"):
        transform(Tied(), "parallel", 0.5)
    report = transform(Tied(), "parallel", 0.5, keep_dense=["head"])
    assert [r.member for r in report.layers] == ["parallel", "dense"]
    twice = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    twice.append(twice[0])
    with pytest.raises(UserError, match=r"2\.weight is 0\.weight too"):
        transform(twice, "parallel", 0.5)


def test_layers_whose_owner_uses_their_weight_stay():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    (report,) = transform(model, "parallel", 0.5).layers
    assert report.name == "0.out_proj" and "may use its weight directly" in report.reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"member": "wide"}, "member 'wide' is none of.*widen changes a network's widths"),
        ({"member": "wider"}, "member 'wider' is none of"),
        ({"sparsity": 1.0}, r"sparsity 1.0 is not in \[0, 1\)"),
        ({"member": "low_rank"}, "low_rank has dense weights, sparsity 0"),
        ({"filter": ["layer3.*"]}, "filter: 'layer3.*' matches no"),
        ({"keep_dense": ["layer3.*"]}, "keep_dense: 'layer3.*' matches no"),
        ({"non_linearity": "tanh"}, "non_linearity 'tanh': conv1 takes one of identity"),
        ({"non_linearity": "batchnorm_relu"}, "'batchnorm_relu': fc takes one of"),
    ],
)
def test_what_is_refused(changes, message):
    model = network()
    names = list(model.state_dict())
    arguments = {"member": "parallel", "sparsity": 0.5, **changes}
    with pytest.raises(UserError, match=message):
        transform(model, **arguments)
    assert list(model.state_dict()) == names


def test_a_layer_alone_is_refused():
    with pytest.raises(UserError, match="put it into an nn"):
        transform(nn.Linear(3, 3), "parallel", 0.5)
