"""What is kept or dropped together: single weights, or blocks of b_out x b_in."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BlockStructure:
    """Blocks of `[b_out, b_in]`; 1 x 1 is unstructured.

    A block's score is the L2 norm (or the maximum magnitude) of its values, or of its summed
    gradient. Positions are canonical: row-major in the block grid.
    """

    block: tuple[int, int] = (1, 1)
    score: Literal["l2", "max"] = "l2"

    @property
    def unstructured(self) -> bool:
        return self.block == (1, 1)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the block grid of a `[out, in]` weight."""
        rows, cols = shape[0] // self.block[0], shape[1] // self.block[1]
        if rows * self.block[0] != shape[0] or cols * self.block[1] != shape[1]:
            raise ValueError(f"blocks of {self.block} do not divide a weight of {shape}")
        return rows, cols
