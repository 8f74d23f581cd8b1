"""What one rank holds of a layer's mask, and what it does to tensors.

Unstructured masks are sharded like the weights they belong to: a rank holds the bits of its
fragment. Masks of blocks are a bit a block, and every rank holds all of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_gpt.topology import passes
from sparse_gpt.topology.bits import Bits, chunks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerMask:
    """The mask of a `[out, in]` weight; `bits` are its units `start .. start + bits.numel - 1`.

    A unit is a weight, or a `block`; its canonical index is row-major in the weight, or in the
    grid of blocks. `active` counts the active units of the whole layer, over all ranks.
    `whole`: every rank holds the bits of single weights too (compact storage).
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    bits: Bits
    start: int
    active: int
    whole: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    @property
    def units(self) -> int:
        """Units of the whole layer."""
        return self.grid[0] * self.grid[1]

    @property
    def block_size(self) -> int:
        return self.block[0] * self.block[1]

    @property
    def sharded(self) -> bool:
        """Whether ranks hold bits of their own, of what they own of the weight."""
        return self.block_size == 1 and not self.whole

    def flags(self, start: int, stop: int) -> Tensor:
        """0/1 uint8 of elements `[start, stop)` of the flattened weight: 1 inside the mask."""
        if self.block_size == 1:
            return self.bits.flags(start - self.start, stop - self.start)
        out_size, in_size = self.block
        width, columns = self.shape[1], self.grid[1]
        first, last = start // width // out_size, -(-stop // width // out_size)
        # Bits are read from multiples of 8.
        before = first * columns % 8
        blocks = self.bits.flags(first * columns - before, last * columns)[before:]
        rows = blocks.view(-1, columns).repeat_interleave(in_size, dim=1)
        bands = rows[:, None].expand(-1, out_size, -1).reshape(-1)
        offset = first * out_size * width
        return bands[start - offset : stop - offset]

    def zero_outside_(self, values: Tensor | Sequence[Tensor], start: int) -> None:
        """Make elements outside the mask exactly 0 in place.

        `values`, one or several `[n]` of any dtype on one device: elements
        `start .. start + n - 1` of the flattened weight. A selection by bits, not a product:
        infinities and NaN outside become 0 too.
        """
        values = [values] if isinstance(values, Tensor) else list(values)
        mask = self.on(values[0].device)
        bits, place = mask.bits.data, start - self.start
        simple = self.block_size == 1 and bits.device.type == "cpu" and place % 8 == 0
        simple &= all(v.is_contiguous() and v.element_size() in _INTEGERS for v in values)
        if simple and (native := passes.native_passes()):
            for value in values:
                native.keep_only(bits[place // 8 :], value)
            return
        integers = [value.view(_INTEGERS[value.element_size()]) for value in values]
        for first, last in chunks(values[0].numel(), values[0].device):
            flags = mask.flags(start + first, start + last)
            keep = flags.to(integers[0].dtype).neg_()
            for value in integers:
                value[first:last].bitwise_and_(keep.to(value.dtype))

    def scale_outside_(self, values: Tensor, start: int, factor: float) -> None:
        """Multiply elements `start .. start + n - 1` outside the mask by a factor in place."""
        if factor == 0.0:
            self.zero_outside_(values, start)
            return
        mask = self.on(values.device)
        for first, last in chunks(values.numel(), values.device):
            flags = mask.flags(start + first, start + last).view(torch.bool)
            chunk = values[first:last]
            chunk.copy_(torch.where(flags, chunk, chunk * factor))

    def square_sum(self, values: Tensor, start: int) -> Tensor:
        """0-d fp64: sum of squares of the elements inside the mask, without changing them."""
        mask = self.on(values.device)
        total = torch.zeros((), dtype=torch.float64, device=values.device)
        for first, last in chunks(values.numel(), values.device):
            chunk = values[first:last].float().clone()
            mask.zero_outside_(chunk, start + first)
            total += torch.linalg.vector_norm(chunk).double() ** 2
        return total

    def on(self, device: torch.device) -> "LayerMask":
        """The same on another device."""
        if self.bits.data.device == device:
            return self
        return replace(self, bits=self.bits.to(device))


@dataclass(frozen=True)
class SavedLayer:
    """A sparse layer as it was saved: its grid of blocks, the block, and active blocks.

    `trained`: blocks in B where that is a set of its own. `stores_all`: whether weights outside
    A have values. `alpha`: Powerpropagation's, 1 without. `target`: active blocks when its
    method is done; None where that is not known. `compact`: stored as values of its active blocks.
    `ever_active`: blocks that were active at any time of the run; None where that is not known.
    """

    grid: tuple[int, int]
    block: tuple[int, int]
    active: int
    trained: int | None = None
    stores_all: bool = False
    alpha: float = 1.0
    target: int | None = None
    compact: bool = False
    ever_active: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole `[out, in]` weight."""
        return self.grid[0] * self.block[0], self.grid[1] * self.block[1]

    @property
    def weights(self) -> int:
        return self.grid[0] * self.grid[1] * self.block[0] * self.block[1]

    @property
    def active_weights(self) -> int:
        return self.active * self.block[0] * self.block[1]

    @property
    def never_active_weights(self) -> int | None:
        """Weights outside every forward set A of the run; None where that is not known."""
        if self.ever_active is None:
            return None
        return self.weights - self.ever_active * self.block[0] * self.block[1]


def unfinished(layers: Iterable[SavedLayer]) -> str:
    """Why masks are not those their method ends with, in words; empty where they are.

    Dense phases of AC/DC, and the pruning of GMP and GraNet, save more than the final sparsity.
    """
    saved = [layer for layer in layers if layer.target is not None]
    active = sum(layer.active for layer in saved)
    target = sum(layer.target or 0 for layer in saved)
    if active == target:
        return ""
    return (
        f"saved before its method reached its sparsity ({active:,} active blocks, {target:,} at "
        "the end)"
    )
