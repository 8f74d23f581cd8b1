"""Linear layers: one whose weight may be sparse, and one that is dense and a part of another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_gpt.ops import KERNELS, Kernel, Pattern, power


class SparseLinear(nn.Module):
    """`y = x (A * W)^T + b`; without a pattern, exactly `nn.Linear`.

    The weight is a dense `[out, in]` parameter (masked storage). The topology controller keeps it
    exactly zero outside the mask and masks its gradient where it is sharded, so a sparse layer
    needs no `pattern` here; kernels that ask for one get it from the controller, with `dense_grad`
    for the steps whose dense gradient grows new weights. Neither is part of the state dict: a
    topology is saved by the checkpoint, sharded.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.pattern: Pattern | None = None
        self.dense_grad = False
        self.alpha = 1.0  # Powerpropagation: the weight is a power of the parameter
        self.kernel: Kernel = KERNELS["masked"]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias`: of the layer this one is a part of, where it has none of its own."""
        bias = self.bias if bias is None else bias
        weight = power(self.weight, self.alpha)
        if self.pattern is None:
            return F.linear(x, weight, bias)
        grad = "dense" if self.dense_grad else "active"
        return self.kernel(x, weight, bias, self.pattern, grad)

    def extra_repr(self) -> str:
        block = None if self.pattern is None else self.pattern.block
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
