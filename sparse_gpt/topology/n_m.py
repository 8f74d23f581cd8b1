"""N:M masks as functions of scores: exactly N of each M weights.

1D: of each M consecutive weights of a row, along the input dimension. Transposable (2D): in every
row and every column of each tile of M x M, so that W and its transpose are N:M and both passes can
use it (Pool et al. 2021, appendix E.2). Tiles of up to 4 x 4 take the best of all patterns (90 for
2:4); larger ones are searched (`tile_search`).

Scores are integers, and what is compared are sums of integers: a mask does not depend on the
device, nor on what other tiles are solved with it.
"""

import functools
from itertools import combinations, product

import torch
from torch import Tensor

from sparse_gpt.topology.bits import chunk_size
from sparse_gpt.topology.groups import best_in_groups
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.tile_search import greedy, improve_, repair_

BITS = 40  # of benefits: up to M = 32 a thousand of them, and as many pins, fit int64
_MAGNITUDE = 0x7FFFFFFF
_ENUMERATED = 4  # tiles up to this size: 3,000 patterns of 5 x 5 would cost more than a search


def magnitude_keys(weight: Tensor) -> Tensor:
    """int32 keys that are ordered as the magnitudes of finite fp32 values are: their bits."""
    return weight.float().contiguous().view(torch.int32) & _MAGNITUDE


def n_m_mask(keys: Tensor, n: int, m: int) -> Tensor:
    """The N largest of each M consecutive keys of a row; ties go to the lower index.

    `keys`: integers of 0 or more, `[out, in]`; M must divide `in`. Returns bool of that shape.
    """
    groups = keys.reshape(-1, m)
    counts = torch.full((len(groups),), n, device=keys.device)
    every = torch.ones_like(groups, dtype=torch.bool)
    return best_in_groups(groups, every, counts).view(keys.shape)


def transposable_mask(tiles: Tensor, n: int, start: Tensor | None = None) -> Tensor:
    """N in every row and column of each tile, of large total benefit: bool `[tiles, M, M]`.

    `tiles`: int64 benefits of 0 or more, `[tiles, M, M]`. Up to M = 8 the total is the largest
    there is; for larger M the search ends a little before that. Up to M = 4, of patterns with
    equal totals the one is taken that has their first differing place. The search begins at
    `start`, a mask with these counts, or at a greedy one, and never ends below it.
    """
    m = tiles.shape[1]
    # Ten to twenty numbers of 8 bytes a place, or a total a pattern.
    places = len(tile_patterns(n, m)) if m <= _ENUMERATED else 2 * m * m
    at_once = max(1, chunk_size(tiles.device) // places)
    out = torch.empty_like(tiles, dtype=torch.bool)
    for at in range(0, len(tiles), at_once):
        benefit = tiles[at : at + at_once]
        if m <= _ENUMERATED:
            out[at : at + at_once] = _best_pattern(benefit, n)
            continue
        if start is None:
            mask = greedy(benefit, n)
            repair_(benefit, mask, n)
        else:
            mask = start[at : at + at_once].clone()
        improve_(benefit, mask)
        out[at : at + at_once] = mask
    return out


def _best_pattern(benefit: Tensor, n: int) -> Tensor:
    # Totals are whole numbers below 2^53, so that fp64 adds them exactly, in any order.
    patterns = tile_patterns(n, benefit.shape[1]).to(benefit.device)
    totals = benefit.flatten(1).double() @ patterns.flatten(1).double().t()
    return patterns[totals.argmax(1)]  # the first of equal ones


@functools.cache
def tile_patterns(n: int, m: int) -> Tensor:
    """Every mask of M x M with N in each row and column, bool `[patterns, M, M]`.

    Of two, the one that has their first differing place comes first.
    """
    rows = [[i in some for i in range(m)] for some in combinations(range(m), n)]
    full = [some for some in product(rows, repeat=m) if all(sum(c) == n for c in zip(*some))]
    return torch.tensor(full)


def tiles_of(matrix: Tensor, m: int) -> Tensor:
    """`[rows, columns]` -> tiles `[rows / M * columns / M, M, M]`, row-major in the grid."""
    rows, columns = matrix.shape
    grid = matrix.reshape(rows // m, m, columns // m, m)
    return grid.transpose(1, 2).reshape(-1, m, m)


def untiled(tiles: Tensor, columns: int) -> Tensor:
    """The inverse of `tiles_of`, for a matrix with so many columns."""
    m = tiles.shape[1]
    grid = tiles.reshape(-1, columns // m, m, m)
    return grid.transpose(1, 2).reshape(-1, columns)


def tile_benefits(keys: Tensor, random: bool) -> Tensor:
    """int64 benefits below 2^BITS of tiles of int32 keys, `[tiles, M, M]`.

    Random keys are their own benefits. Others are magnitudes' bits: the magnitudes in fixed point,
    in units of 2^-BITS of the power of two above the tile's largest.
    """
    if random:
        return keys.long()
    # Exponents are read from the bits: a magnitude is below 2^(exponent - 126).
    exponent = (keys.amax((1, 2), keepdim=True) >> 23).long()
    factor = ((1023 + BITS - (exponent - 126)) << 52).view(torch.float64)
    return (keys.contiguous().view(torch.float32).double() * factor).round_().long()


def pinned(benefit: Tensor, kept: Tensor) -> Tensor:
    """Benefits with which a mask keeps all it can of `kept`, whatever else that costs."""
    return torch.where(kept, benefit.shape[1] ** 2 << BITS, benefit)


def transposable_of(keys: Tensor, n: int, m: int, random: bool = False) -> Tensor:
    """The transposable N:M mask of a whole matrix by its int32 keys, bool `[out, in]`."""
    mask = transposable_mask(tile_benefits(tiles_of(keys, m), random), n)
    return untiled(mask, keys.shape[1])


def random_mask(
    seed: int, update: int, layer: str, shape: tuple[int, int], n: int, m: int, transposable: bool
) -> Tensor:
    """A mask that depends on these alone, bool `[out, in]`: the best by random scores.

    1D: every pattern of a group is as likely. Transposable: patterns that are each other's
    permutations of rows or columns are.
    """
    keys = random_scores(seed, update, layer, 0, shape[0] * shape[1]).view(shape)
    if transposable:
        return transposable_of(keys, n, m, random=True)
    return n_m_mask(keys, n, m)
