"""Sparse linear layers over compact storage: the interface of their kernels, and its reference.

    y_i = act(x W_i^T + b_i)        W_i: the weight whose active blocks are the operand's values

One call takes several weights of the same input (q, k and v), so that a kernel can share what it
makes of x. The reference scatters each weight to a dense one and is the masked layer from there:
the same bits in forward and backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_gpt.ops.layout import BlockLayout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Growth:
    """What a backward pass gives away besides gradients, for topologies that grow by gradient.

    `dense`: `add` gets the dense gradient dY^T X of the weight, `[out, in]`; it is only lent.
    `norms`: `add` gets the squared L2 norm of each of its blocks, fp32 `[rows, columns]` of the
    block grid, and no dense gradient is made as a whole.
    """

    kind: Literal["dense", "norms"]
    add: Callable[[Tensor], None]


@dataclass(frozen=True)
class Operand:
    """One weight in compact storage: `values [slots, b_out, b_in]`, and `bias [out]` or None."""

    values: Tensor
    bias: Tensor | None
    layout: BlockLayout
    growth: Growth | None = None


# kernel(x [..., in], operands, activation) -> one [..., out] for each operand.
# activation: None or a name of ACTIVATIONS.
CompactKernel = Callable[[Tensor, Sequence[Operand], str | None], tuple[Tensor, ...]]


def check_operands(x: Tensor, operands: Sequence[Operand], activation: str | None) -> None:
    """Raise `ValueError` or `TypeError` for what does not fit: kernels go by the layout's sizes."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    if not operands:
        raise ValueError("no weight to multiply with")
    for operand in operands:
        values, bias, layout = operand.values, operand.bias, operand.layout
        found = {t.dtype for t in (values, bias, x) if t is not None}
        if len(found) != 1:
            raise TypeError(f"x, values and bias of several dtypes: {found}")
        if x.shape[-1] != layout.shape[1]:
            raise ValueError(f"x of {tuple(x.shape)} and a weight of {layout.shape}")
        check_values(values, layout)
        if bias is not None and bias.shape != (layout.shape[0],):
            raise ValueError(f"a bias of {tuple(bias.shape)} and a weight of {layout.shape}")


def check_values(values: Tensor, layout: BlockLayout) -> None:
    """Raise where values are not those of a layout: a backward pass may find them released."""
    if values.shape != (layout.count, *layout.block):
        raise ValueError(
            f"values of {tuple(values.shape)} for {layout.count} blocks of {layout.block}"
        )


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, values: Tensor, layout: BlockLayout, growth: Growth | None
    ) -> Tensor:
        ctx.layout, ctx.version, ctx.growth = layout, layout.version, growth
        return layout.scatter(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.layout.check(ctx.version)
        if ctx.growth is not None:
            give_growth(ctx.growth, grads[0], ctx.layout.block)
        return ctx.layout.gather(grads[0]), None, None


def sparse_linears(
    x: Tensor, operands: Sequence[Operand], activation: str | None = None
) -> tuple[Tensor, ...]:
    """The specification of a `CompactKernel`."""
    results = []
    for operand in operands:
        weight: Any = _Scatter.apply(operand.values, operand.layout, operand.growth)
        y = F.linear(x, weight, operand.bias)
        results.append(y if activation is None else ACTIVATIONS[activation](y))
    return tuple(results)


def give_growth(growth: Growth, gradient: Tensor, block: tuple[int, int]) -> None:
    """Hand over a dense `[out, in]` gradient, or the squared norms of its blocks."""
    growth.add(gradient if growth.kind == "dense" else block_square_sums(gradient, block))


def block_square_sums(gradient: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 `[rows, columns]`: squared L2 norms of the blocks of a `[out, in]` gradient."""
    rows, columns = gradient.shape[0] // block[0], gradient.shape[1] // block[1]
    grid = gradient.reshape(rows, block[0], columns, block[1]).float()
    return grid.square().sum((1, 3))


def grow_from(growth: Growth, dy: Tensor, x: Tensor, block: tuple[int, int]) -> None:
    """What growth asks for, made from dY `[T, out]` and X `[T, in]`, with torch alone.

    Norms are made a band of rows at a time: the dense gradient never is there as a whole.
    """
    if growth.kind == "dense":
        growth.add(dy.t() @ x)
        return
    band = max(1, 256 // block[0]) * block[0]
    parts = [
        block_square_sums(dy[:, start : start + band].t() @ x, block)
        for start in range(0, dy.shape[1], band)
    ]
    growth.add(torch.cat(parts))
