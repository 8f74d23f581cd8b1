"""Which blocks of a weight take part: the operand every sparse kernel works on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A block grid over a weight of `[out_features, in_features]`; True = the block takes part.

    `active` is a bool tensor of `[out_features / b_out, in_features / b_in]`. Unstructured
    sparsity is the grid of 1 x 1 blocks. The canonical index of a block is its row-major
    position in `active`.
    """

    active: Tensor
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.active.dtype != torch.bool or self.active.dim() != 2:
            raise TypeError(
                "a pattern is a 2-D bool tensor, got "
                f"{self.active.dtype} of {tuple(self.active.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the weight."""
        rows, cols = self.active.shape
        return rows * self.block[0], cols * self.block[1]

    def apply(self, weight: Tensor) -> Tensor:
        """A copy of `weight` (`[out, in]`) with exact zeros outside the pattern.

        A selection, not a product: -0.0, infinities and NaN outside the pattern become 0 too.
        """
        return self._select(weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def apply_(self, weight: Tensor) -> Tensor:
        """Zero `weight` (`[out, in]`, contiguous) outside the pattern, in place."""
        grid = self._grid(weight)
        grid.masked_fill_(~self.active[:, None, :, None], 0)
        return weight

    def expand(self) -> Tensor:
        """The pattern as a bool mask of `[out_features, in_features]`."""
        rows, cols = self.active.shape
        b_out, b_in = self.block
        if self.block == (1, 1):
            return self.active
        grid = self.active[:, None, :, None].expand(rows, b_out, cols, b_in)
        return grid.reshape(rows * b_out, cols * b_in)

    def to(self, device: torch.device | str) -> "Pattern":
        """The same pattern on another device."""
        return Pattern(self.active.to(device), self.block)

    def _grid(self, weight: Tensor) -> Tensor:
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight {tuple(weight.shape)} does not fit pattern {self.shape}")
        rows, cols = self.active.shape
        return weight.view(rows, self.block[0], cols, self.block[1])

    def _select(self, weight: Tensor, other: Tensor) -> Tensor:
        grid = self._grid(weight.contiguous())
        return torch.where(self.active[:, None, :, None], grid, other).view(self.shape)
