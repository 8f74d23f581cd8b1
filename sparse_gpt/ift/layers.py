"""Layers in the forms of `ift.forms`, put together from layers of one weight each.

A part takes `(x, bias)`. Where a form ends in a product, the bias is added in it, as a plain layer
does: that is what makes s = 0 the dense layer bit for bit.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparse_gpt.ift.forms import LayerWeight, layer_weights
from sparse_gpt.model.linear import DenseLinear, SparseLinear
from sparse_gpt.ops import BlockLayout

NonLinearity = Callable[[int], nn.Module]  # of so many features

SIGMAS: dict[str, NonLinearity] = {
    "identity": lambda features: nn.Identity(),
    "relu": lambda features: nn.ReLU(),
    "gelu": lambda features: nn.GELU(),
}


class TransformedLayer(nn.Module):
    """A layer in a member's form. Features are the last axis, or the one before `spatial` axes.

    `parts` are the layers of its weights by name (`branch.0`, `u`, ...), `widths` their output
    features; `bias` `[out]` is the whole layer's, None without one.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        widths: Mapping[str, int],
        sigma: NonLinearity,
        bias: nn.Parameter | None,
        spatial: int = 0,
    ) -> None:
        super().__init__()
        self.spatial = spatial
        self._build(parts, widths, sigma)
        self.bias = bias

    def _build(
        self, parts: Mapping[str, nn.Module], widths: Mapping[str, int], sigma: NonLinearity
    ) -> None:
        raise NotImplementedError

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.view(-1, *[1] * self.spatial)


class Parallel(TransformedLayer):
    """`sum_j sigma(W_j x) + b`."""

    def _build(
        self, parts: Mapping[str, nn.Module], widths: Mapping[str, int], sigma: NonLinearity
    ) -> None:
        self.branch = nn.ModuleList(parts.values())
        self.sigma = nn.ModuleList(sigma(widths[name]) for name in parts)

    def forward(self, x: Tensor) -> Tensor:
        linear = isinstance(self.sigma[0], nn.Identity)
        y = self.branch[0](x, self.bias) if linear else self.sigma[0](self.branch[0](x, None))
        for branch, sigma in list(zip(self.branch, self.sigma))[1:]:
            y = y + sigma(branch(x, None))
        return y if linear else self._add_bias(y)


class Factored(TransformedLayer):
    """`V sigma(U x) + b`: Factorized, and Low Rank."""

    def _build(
        self, parts: Mapping[str, nn.Module], widths: Mapping[str, int], sigma: NonLinearity
    ) -> None:
        self.u, self.v, self.sigma = parts["u"], parts["v"], sigma(widths["u"])

    def forward(self, x: Tensor) -> Tensor:
        return self.v(self.sigma(self.u(x, None)), self.bias)


class Doped(TransformedLayer):
    """`V (U x) + sigma(W x) + b`; without U and V where the low-rank part has no width."""

    def _build(
        self, parts: Mapping[str, nn.Module], widths: Mapping[str, int], sigma: NonLinearity
    ) -> None:
        self.u, self.v = parts.get("u"), parts.get("v")
        self.sparse, self.sigma = parts["sparse"], sigma(widths["sparse"])

    def forward(self, x: Tensor) -> Tensor:
        if self.u is not None and self.v is not None:
            return self.v(self.u(x, None), self.bias) + self.sigma(self.sparse(x, None))
        if isinstance(self.sigma, nn.Identity):
            return self.sparse(x, self.bias)
        return self._add_bias(self.sigma(self.sparse(x, None)))


LAYERS: dict[str, type[TransformedLayer]] = {
    "parallel": Parallel,
    "factorized": Factored,
    "low_rank": Factored,
    "doped": Doped,
}


def transformed_layer(
    member: str,
    size: int,
    shape: tuple[int, int],
    sigma: NonLinearity,
    make: Callable[[str, LayerWeight], nn.Module],
    bias: nn.Parameter | None,
    spatial: int = 0,
) -> TransformedLayer:
    """A layer of `[out, in]` in a member's form; `make(name, weight)` makes the parts."""
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in layer_weights(member, size, shape).items()
    }
    return LAYERS[member](
        {name: make(name, weight) for name, weight in weights.items()},
        {name: weight.shape[0] for name, weight in weights.items()},
        sigma,
        bias,
        spatial,
    )


def transformed_linear(
    member: str,
    size: int,
    shape: tuple[int, int],
    non_linearity: str,
    layouts: Mapping[str, BlockLayout] | None = None,
) -> TransformedLayer:
    """A linear layer of `[out, in]` in a member's form; parameters are uninitialised.

    `layouts`: sparse weights in compact storage by name (`branch.0.weight`).
    """
    layouts = layouts or {}

    def make(name: str, weight: LayerWeight) -> nn.Module:
        out, inner = weight.shape
        if not weight.sparse:
            return DenseLinear(inner, out)
        return SparseLinear(inner, out, bias=False, layout=layouts.get(f"{name}.weight"))

    bias = nn.Parameter(torch.empty(shape[0]))
    return transformed_layer(member, size, shape, SIGMAS[non_linearity], make, bias)
