"""Where the active blocks of a weight are, for kernels over compact storage."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Where each row begins; the column of each entry; its slot.
View = tuple[Tensor, Tensor, Tensor]


class BlockLayout:
    """The active blocks of a `[out, in]` weight, and in which slot each one's values lie.

    Compact storage is `values [slots, b_out, b_in]`. `slots[s]`, int32, is the canonical index
    (row-major in the block grid) of the block in slot s. Slots never move: a grown block takes a
    dropped one's slot, so their order says nothing, and kernels go by these views of it, all int32
    on the device of the values, made when first asked for and kept:

    | view        | of        |                                                             |
    |-------------|-----------|-------------------------------------------------------------|
    | `row_slot`  | [slots]   | slots in row order: by block row, and by column inside      |
    | `row_ptr`   | [rows+1]  | where each block row begins in it                           |
    | `col_idx`   | [slots]   | the block column of each entry of `row_slot`                |
    | `col_slot`  | [slots]   | slots in column order: by block column, by row inside       |
    | `col_ptr`   | [cols+1]  | where each block column begins in it                        |
    | `row_idx`   | [slots]   | the block row of each entry of `col_slot`                   |

    All are rewritten in place by `rewrite`, which counts up `version`: addresses and shapes stay
    (CUDA graphs), and a backward pass can tell that it is not of the topology of its forward pass
    (`check`). What a kernel derives besides is kept in `cache`, which `rewrite` empties.
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
        self.slots = torch.empty(slots.numel(), dtype=torch.int32, device=slots.device)
        self._views: dict[bool, View] = {}  # by rows, by columns
        self.rewrite(slots)

    @property
    def count(self) -> int:
        """Active blocks, which is slots."""
        return self.slots.numel()

    @property
    def row_ptr(self) -> Tensor:
        return self._kept(False)[0]

    @property
    def col_idx(self) -> Tensor:
        return self._kept(False)[1]

    @property
    def row_slot(self) -> Tensor:
        return self._kept(False)[2]

    @property
    def col_ptr(self) -> Tensor:
        return self._kept(True)[0]

    @property
    def row_idx(self) -> Tensor:
        return self._kept(True)[1]

    @property
    def col_slot(self) -> Tensor:
        return self._kept(True)[2]

    def view(self, transposed: bool, band: int | None = None) -> View:
        """`(row_ptr, col_idx, row_slot)`, or those of columns, without keeping them.

        Of single weights they are as large as the weights: for who makes an order of its own.
        `band`: that many columns at a time, all rows of the first band, then of the next; the
        pointers are `[bands * rows + 1]`, and columns are counted from the first.
        """
        whole = self.grid[not transposed]
        if band is None or band >= whole:
            return self._views.get(transposed) or self._made(transposed, whole)
        return self._made(transposed, band)

    def _kept(self, transposed: bool) -> View:
        if transposed not in self._views:
            self._views[transposed] = self._made(transposed, self.grid[not transposed])
        return self._views[transposed]

    def _made(self, transposed: bool, band: int) -> View:
        """Linear in the grid, where sorting would be several times slower."""
        places = self.slots.to(torch.int64)
        slot_of = self.slots.new_full((self.grid[0] * self.grid[1],), -1)
        slot_of[places] = torch.arange(self.count, dtype=torch.int32, device=places.device)
        grid = slot_of.view(self.grid)
        grid = grid.t() if transposed else grid
        rows, columns = grid.shape
        bands = -(-columns // band)
        if columns % band:
            grid = F.pad(grid, (0, bands * band - columns), value=-1)
        grid = grid.reshape(rows, bands, band).transpose(0, 1).contiguous()
        active = grid >= 0
        pointers = torch.zeros(bands * rows + 1, dtype=torch.int32, device=places.device)
        pointers[1:] = active.sum(2).view(-1).cumsum(0)
        found = active.view(-1).nonzero().view(-1)
        minors = found % band
        if bands > 1:
            minors += found.div(rows * band, rounding_mode="floor") * band
        return pointers, minors.to(torch.int32), grid.view(-1)[found]

    def rewrite(self, slots: Tensor) -> None:
        """Other blocks in the slots; their number stays. Raises `ValueError` on bad indices."""
        rows, columns = self.grid
        if slots.shape != self.slots.shape:
            raise ValueError(f"{slots.numel()} blocks do not fit {self.count} slots")
        places = slots.to(self.slots.device, torch.int64)
        if self.count and not 0 <= int(places.min()) <= int(places.max()) < rows * columns:
            raise ValueError(f"blocks out of a grid of {self.grid}")
        taken = torch.zeros(rows * columns, dtype=torch.bool, device=places.device)
        taken[places] = True
        if int(taken.sum()) != self.count:
            raise ValueError("a block is in two slots")
        self.slots.copy_(places)
        for transposed, view in self._views.items():
            for kept, made in zip(
                view, self._made(transposed, self.grid[not transposed]), strict=True
            ):
                kept.copy_(made)
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
