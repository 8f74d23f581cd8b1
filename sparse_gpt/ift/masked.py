"""Layers with a fixed mask in a buffer, for modules outside the GPT's topology; and their FLOPs.

`mask` is None where the weight is dense. `bias` is that of the layer one is a part of, where it has
none of its own.
"""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLinear(nn.Linear):
    """`y = x (A * W)^T + b`."""

    mask: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor | None, bias: nn.Parameter | None) -> None:
        with torch.device("meta"):  # the constructor would draw weights
            super().__init__(weight.shape[1], weight.shape[0], bias is not None)
        self.weight, self.bias = nn.Parameter(weight), bias
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        return F.linear(input, weight, self.bias if bias is None else bias)


class MaskedConv2d(nn.Conv2d):
    """A convolution with `A * W`; `options` are `nn.Conv2d`'s stride, padding, groups, ..."""

    mask: Tensor | None

    def __init__(
        self, weight: Tensor, mask: Tensor | None, bias: nn.Parameter | None, **options: Any
    ) -> None:
        out, inner, *kernel = weight.shape
        inner *= options.get("groups", 1)
        with torch.device("meta"):
            super().__init__(inner, out, (kernel[0], kernel[1]), bias=bias is not None, **options)
        self.weight, self.bias = nn.Parameter(weight), bias
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        return self._conv_forward(input, weight, self.bias if bias is None else bias)


def conv_options(layer: nn.Conv2d) -> dict[str, Any]:
    """What a convolution is besides its weight and bias."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


def random_mask(
    seed: int, name: str, shape: tuple[int, ...], units: int, block: tuple[int, int] = (1, 1)
) -> Tensor:
    """bool of a weight's shape with exactly `units` active blocks, from (seed, name).

    Blocks are `[b_out, b_in]` of the weight as a matrix, `[out, in * k_h * k_w]`.
    """
    rows, columns = shape[0] // block[0], torch.Size(shape[1:]).numel() // block[1]
    digest = hashlib.sha256(f"mask/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    grid = torch.zeros(rows * columns, dtype=torch.bool)
    grid[torch.randperm(rows * columns, generator=generator)[:units]] = True
    matrix = grid.view(rows, columns)
    return matrix.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).view(shape)


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Forward FLOPs of every linear layer and convolution on these inputs: 2 a MAC.

    Masked weights count their active ones. Biases, normalisation and non-linearities do not count.
    """
    total = 0

    def count(layer: Any, _: Any, y: Tensor) -> None:
        nonlocal total
        mask = getattr(layer, "mask", None)
        active = layer.weight.numel() if mask is None else int(mask.sum())
        total += 2 * active * (y.numel() // layer.weight.shape[0])

    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training = module.training
    try:
        module.eval()  # batch statistics are left alone
        with torch.no_grad():
            module(*inputs)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return total
