"""Scores of blocks whose weights are spread over ranks: the same bits for every layout.

A sum in floating point depends on the order of its terms, and so on where ranks cut a layer.
Squares are therefore summed in fixed point: the square of an fp32 number is exact in fp64, it is
rounded to a multiple of 2^-62 of the largest sum a block could have, and int64 sums are exact in
any order. Comparing squared norms orders blocks as their norms do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sparse_gpt.topology.bits import chunk_size, chunks
from sparse_gpt.topology.keys import NonFiniteScores

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
Reduce = Callable[[Tensor], Tensor]


def block_scores(
    parts: Sequence[tuple[int, Tensor] | None],
    shapes: Sequence[tuple[int, int]],
    block: tuple[int, int],
    score: Literal["l2", "max"],
    reduce_sum: Reduce,
    reduce_max: Reduce,
    device: torch.device,
    common_scale: bool = False,
) -> list[Tensor]:
    """int64 scores `[blocks]` of every layer, the same on every rank. A collective.

    `parts[i]`: start and values (1-D) of this rank's elements of layer i, None for none. `l2`:
    squared norm of a block in fixed point, in units of the layer's own, or of one for all layers
    (`common_scale`); `max`: the bits of its largest magnitude. Every rank raises `NonFiniteScores`
    where a value is not finite on any rank.
    """
    largest = torch.zeros(len(parts), dtype=torch.int32, device=device)
    for i, part in enumerate(parts):
        if part is not None and part[1].numel():
            largest[i] = _largest(part[1])
    tops = reduce_max(largest).tolist()
    if any(top >= _INFINITY for top in tops):
        raise NonFiniteScores
    if common_scale:
        tops = [max(tops)] * len(tops)
    grids = [(rows // block[0], columns // block[1]) for rows, columns in shapes]
    sizes = [rows * columns for rows, columns in grids]
    flat = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
    for part, shape, grid, top, out in zip(parts, shapes, grids, tops, flat.split(sizes)):
        if part is not None and part[1].numel():
            _add_part(out.view(grid), part, shape[1], block, None if score == "max" else top)
    return list((reduce_sum if score == "l2" else reduce_max)(flat).split(sizes))


def _largest(values: Tensor) -> Tensor:
    """0-d int32: the bits of the largest magnitude."""
    ranges = chunks(values.numel(), values.device)
    return torch.stack([_bits(values[start:stop]).max() for start, stop in ranges]).max()


def _bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32) & _MAGNITUDE


def _add_part(
    out: Tensor, part: tuple[int, Tensor], width: int, block: tuple[int, int], top: int | None
) -> None:
    """Add this rank's elements to `out [rows, columns]` of blocks; `top` None: their maximum."""
    start, values = part
    rows_at_once = max(1, chunk_size(values.device) // width)
    end = start + values.numel()
    factor = 1.0 if top is None else _scale(top, block[0] * block[1])
    for row in range(start // width, -(-end // width), rows_at_once):
        rows = min(rows_at_once, -(-end // width) - row)
        # Whole rows, with zeros for what other ranks hold of them.
        first, last = max(start, row * width), min(end, (row + rows) * width)
        whole = torch.zeros(rows * width, dtype=torch.float32, device=values.device)
        whole[first - row * width : last - row * width] = values[first - start : last - start]
        lines = whole.view(rows, width // block[1], block[1])
        bands = torch.arange(row, row + rows, device=out.device) // block[0]
        if top is None:
            largest = _bits(lines).amax(2).to(out)
            out.scatter_reduce_(0, bands[:, None].expand_as(largest), largest, "amax")
        else:
            fixed = lines.double().square_().mul_(factor).round_().to(torch.int64)
            out.index_add_(0, bands, fixed.sum(2).to(out.device))


def _scale(top: int, block_size: int) -> float:
    """A power of two: the squares of a block, none above that of `top`, sum to less than 2^62."""
    largest = torch.tensor(top, dtype=torch.int32).view(torch.float32).item()
    if largest == 0:
        return 1.0
    exponent = math.frexp(largest)[1]  # largest < 2^exponent
    return 2.0 ** (62 - math.ceil(math.log2(block_size)) - 2 * exponent)
