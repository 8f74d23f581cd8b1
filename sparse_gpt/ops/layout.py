"""Where the active blocks of a weight are, for kernels over compact storage."""

import torch
from torch import Tensor


class BlockLayout:
    """The active blocks of a `[out, in]` weight, and in which slot each one's values lie.

    Compact storage is `values [slots, b_out, b_in]`. `slots[s]`, int32, is the canonical index
    (row-major in the block grid) of the block in slot s. Slots never move: a grown block takes a
    dropped one's slot, so their order says nothing, and kernels go by these views of it, all int32
    on the device of the values:

    | view        | of        |                                                             |
    |-------------|-----------|-------------------------------------------------------------|
    | `row_slot`  | [slots]   | slots in row order: by block row, and by column inside      |
    | `row_ptr`   | [rows+1]  | where each block row begins in it                           |
    | `col_idx`   | [slots]   | the block column of each entry of `row_slot`                |
    | `col_slot`  | [slots]   | slots in column order: by block column, by row inside       |
    | `col_ptr`   | [cols+1]  | where each block column begins in it                        |
    | `row_idx`   | [slots]   | the block row of each entry of `col_slot`                   |

    They are all rewritten in place by `rewrite`, which counts up `version`: addresses and shapes
    stay (CUDA graphs), and a backward pass can tell that it is not of the topology of its forward
    pass (`check`). What a kernel derives besides is kept in `cache`, which `rewrite` empties.
    """

    def __init__(self, shape: tuple[int, int], block: tuple[int, int], slots: Tensor) -> None:
        """`slots`: distinct canonical indices, integers `[slots]`; copied."""
        rows, columns = shape[0] // block[0], shape[1] // block[1]
        if (rows * block[0], columns * block[1]) != tuple(shape):
            raise ValueError(f"blocks of {block} do not divide a weight of {shape}")
        if rows * columns >= 2**31:
            raise ValueError(f"a weight of {shape} has more than 2^31 blocks of {block}")
        self.shape, self.block, self.grid = shape, block, (rows, columns)
        self.version = 0
        self.cache: dict[object, object] = {}
        count, device = slots.numel(), slots.device

        def index(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        self.slots, self.row_slot, self.col_slot = index(count), index(count), index(count)
        self.col_idx, self.row_idx = index(count), index(count)
        self.row_ptr, self.col_ptr = index(rows + 1), index(columns + 1)
        self.rewrite(slots)

    @property
    def count(self) -> int:
        """Active blocks, which is slots."""
        return self.slots.numel()

    def rewrite(self, slots: Tensor) -> None:
        """Other blocks in the slots; their number stays. Raises `ValueError` on bad indices."""
        rows, columns = self.grid
        if slots.shape != self.slots.shape:
            raise ValueError(f"{slots.numel()} blocks do not fit {self.count} slots")
        places = slots.to(self.slots.device, torch.int64)
        if self.count and not 0 <= int(places.min()) <= int(places.max()) < rows * columns:
            raise ValueError(f"blocks out of a grid of {self.grid}")
        # The slot of every block of the grid: linear, where sorting is several times slower.
        slot_of = torch.full((rows * columns,), -1, dtype=torch.int32, device=places.device)
        slot_of[places] = torch.arange(self.count, dtype=torch.int32, device=places.device)
        by_column = slot_of.view(rows, columns).t().reshape(-1)
        for grid, width, order, minor, pointers in (
            (slot_of, columns, self.row_slot, self.col_idx, self.row_ptr),
            (by_column, rows, self.col_slot, self.row_idx, self.col_ptr),
        ):
            found = (grid >= 0).nonzero().view(-1)
            if found.numel() != self.count:
                raise ValueError("a block is in two slots")
            order.copy_(grid[found])
            minor.copy_(found % width)
            pointers[0] = 0
            pointers[1:] = (grid.view(-1, width) >= 0).sum(1).cumsum(0)
        self.slots.copy_(slots)
        self.version += 1
        self.cache.clear()

    def check(self, version: int) -> None:
        """Raise where a backward pass is of another topology than its forward pass."""
        if version != self.version:
            raise RuntimeError("the topology changed between a forward and its backward pass")

    def scatter(self, values: Tensor) -> Tensor:
        """`values [slots, b_out, b_in]` -> the `[out, in]` weight, exact zeros elsewhere."""
        rows, columns = self.grid
        b_out, b_in = self.block
        grid = values.new_zeros(rows * columns, b_out, b_in)
        grid[self.slots.to(values.device, torch.int64)] = values
        return grid.view(rows, columns, b_out, b_in).transpose(1, 2).reshape(self.shape)

    def gather(self, weight: Tensor) -> Tensor:
        """The active blocks of a `[out, in]` weight: `[slots, b_out, b_in]`."""
        rows, columns = self.grid
        b_out, b_in = self.block
        places = self.slots.to(weight.device, torch.int64)
        grid = weight.reshape(rows, b_out, columns, b_in)
        return grid[places // columns, :, places % columns]

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The same on another device."""
        if self.slots.device == torch.device(device):
            return self
        return BlockLayout(self.shape, self.block, self.slots.to(device))
