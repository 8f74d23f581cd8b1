"""What is kept or dropped together: single weights, or blocks of b_out x b_in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockStructure:
    """Blocks of `[b_out, b_in]`; 1 x 1 is unstructured.

    A block's score is the L2 norm (or the maximum magnitude) of its values, or of its summed
    gradient. Positions are canonical: row-major in the block grid.
    """

    block: tuple[int, int] = (1, 1)
    score: str = "l2"

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the block grid of a `[out, in]` weight."""
        rows, cols = shape[0] // self.block[0], shape[1] // self.block[1]
        if rows * self.block[0] != shape[0] or cols * self.block[1] != shape[1]:
            raise ValueError(f"blocks of {self.block} do not divide a weight of {shape}")
        return rows, cols

    def scores(self, values: Tensor) -> Tensor:
        """`values [out, in]` (weights or gradients) -> fp32 scores `[rows, cols]`, all >= 0.

        The sum over a block runs over the whole block in a fixed order, so that a score does not
        depend on how the layer is sharded.
        """
        values = values.float()
        if self.block == (1, 1):
            return values.abs()
        rows, cols = self.grid((values.shape[0], values.shape[1]))
        blocks = values.view(rows, self.block[0], cols, self.block[1])
        if self.score == "max":
            return blocks.abs().amax(dim=(1, 3))
        return blocks.square().sum(dim=(1, 3)).sqrt()


def top_units(scores: Tensor, count: int) -> Tensor:
    """Bool mask (shape of `scores`) of the `count` largest; ties go to the lower index."""
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"cannot keep {count} of {flat.numel()}")
    order = torch.sort(flat, descending=True, stable=True).indices
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
