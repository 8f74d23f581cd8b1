"""What is kept or dropped together, and which units share a count."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Groups:
    """Groups of `width` consecutive units of a layer, each with exactly `quota` active ones.

    `tiles`: width x width units, with that quota in every row and column; then `columns` is the
    width of the layer.
    """

    width: int
    quota: int
    columns: int
    tiles: bool = False

    @property
    def span(self) -> int:
        """Consecutive units, from a multiple of it, that groups do not reach out of."""
        return self.width * self.columns if self.tiles else self.width

    def active(self, units: int) -> int:
        """Active ones of so many units."""
        return units // self.width * self.quota


@dataclass(frozen=True)
class BlockStructure:
    """Blocks of `[b_out, b_in]`; 1 x 1 are single weights.

    A block's score is the L2 norm (or the maximum magnitude) of its values, or of its summed
    gradient. Positions are canonical: row-major in the block grid.

    `n_m`: single weights, N of each M along the input dimension; `transposable`: in every row and
    column of each M x M tile. `balanced`: as many units in every row of the block grid.
    """

    block: tuple[int, int] = (1, 1)
    score: Literal["l2", "max"] = "l2"
    n_m: tuple[int, int] | None = None
    transposable: bool = False
    balanced: bool = False

    @property
    def unstructured(self) -> bool:
        """Whether units are single weights, which are sharded."""
        return self.block == (1, 1)

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the block grid of a `[out, in]` weight."""
        rows, cols = shape[0] // self.block[0], shape[1] // self.block[1]
        if rows * self.block[0] != shape[0] or cols * self.block[1] != shape[1]:
            raise ValueError(f"blocks of {self.block} do not divide a weight of {shape}")
        return rows, cols

    def groups(self, shape: tuple[int, int], units: int) -> Groups | None:
        """The groups of a `[out, in]` weight with so many active units; None where it has none.

        Raises `ValueError` where they do not divide it, or cannot share out that number.
        """
        rows, columns = self.grid(shape)
        if self.n_m is None and not self.balanced:
            return None
        if self.n_m is None:
            groups = Groups(columns, units // rows, columns)
        else:
            n, m = self.n_m
            groups = Groups(m, n, columns, self.transposable)
        if columns % groups.width or rows * columns % groups.span:
            raise ValueError(f"groups of {groups.width} do not divide a weight of {shape}")
        if groups.active(rows * columns) != units:
            raise ValueError(f"{units} active units cannot be shared out to groups of {shape}")
        return groups
