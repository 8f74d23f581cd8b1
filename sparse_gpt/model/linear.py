"""Linear layers: one whose weight may be sparse, and one that is dense and a part of another."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_gpt.ops import (
    ACTIVATIONS,
    COMPACT,
    KERNELS,
    BlockLayout,
    CompactKernel,
    Growth,
    Kernel,
    Operand,
    Pattern,
    power,
)


class SparseLinear(nn.Module):
    """`y = x (A * W)^T + b`; without a pattern, exactly `nn.Linear`.

    Masked storage (`layout` None): the weight is a dense `[out, in]` parameter. The topology
    controller keeps it exactly zero outside the mask and masks its gradient where it is sharded, so
    a sparse layer needs no `pattern` here; kernels that ask for one get it from the controller,
    with `dense_grad` for the steps whose dense gradient grows new weights.

    Compact storage: the weight is the values of the active blocks, `[slots, b_out, b_in]`, and
    `layout` says where they lie. `growth` asks the backward pass for what new blocks grow by.

    None of these is part of the state dict: a topology is saved by the checkpoint, sharded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        layout: BlockLayout | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        shape = (out_features, in_features)
        if layout is not None:
            if layout.shape != shape:
                raise ValueError(f"a layout of {layout.shape} is not of a weight of {shape}")
            shape = (layout.count, *layout.block)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.pattern: Pattern | None = None
        self.dense_grad = False
        self.growth: Growth | None = None
        self.alpha = 1.0  # Powerpropagation: the weight is a power of the parameter
        self.kernel: Kernel = KERNELS["masked"]
        self.compact_kernel: CompactKernel = COMPACT["reference"]

    def operand(self, bias: Tensor | None = None) -> Operand:
        """What a kernel over compact storage computes this layer from."""
        assert self.layout is not None
        bias = self.bias if bias is None else bias
        return Operand(power(self.weight, self.alpha), bias, self.layout, self.growth)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias`: of the layer this one is a part of, where it has none of its own."""
        if self.layout is not None:
            return _compact(x, (self,), bias, None)[0]
        bias = self.bias if bias is None else bias
        weight = power(self.weight, self.alpha)
        if self.pattern is None:
            return F.linear(x, weight, bias)
        grad = "dense" if self.dense_grad else "active"
        return self.kernel(x, weight, bias, self.pattern, grad)

    def extra_repr(self) -> str:
        where = self.pattern if self.layout is None else self.layout
        block = None if where is None else where.block
        return f"in_features={self.in_features}, out_features={self.out_features}, block={block}"


class DenseLinear(nn.Module):
    """`y = x A^T`, or with the `bias` of the layer it is a part of; never sparse."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _is_whole(layer: SparseLinear) -> bool:
    """Whether a layer is compact and has its values: ZeRO 3 gathers them when it is called."""
    return layer.layout is not None and not hasattr(layer.weight, "ds_id")


def _by_kernel(
    x: Tensor, layers: Sequence[SparseLinear], bias: Tensor | None, activation: str | None
) -> tuple[Tensor, ...]:
    return layers[0].compact_kernel(x, [layer.operand(bias) for layer in layers], activation)


# A compiler would trace what backward gives away (`ops.Growth`), and indices that change in place.
_compact: Any = torch.compiler.disable(_by_kernel)


def linears(
    x: Tensor, layers: Sequence[nn.Module], activation: str | None = None
) -> tuple[Tensor, ...]:
    """`act(layer(x))` of each layer, in one call of a kernel where all are compact ones: then the
    layers are not called as modules, and hooks on them are not run.

    `activation`: a name of `ops.ACTIVATIONS`, or None.
    """
    compact = [layer for layer in layers if isinstance(layer, SparseLinear) and _is_whole(layer)]
    if len(compact) == len(layers) and len({layer.compact_kernel for layer in compact}) == 1:
        return _compact(x, compact, None, activation)
    results = tuple(layer(x) for layer in layers)
    return results if activation is None else tuple(ACTIVATIONS[activation](y) for y in results)
