"""M x M masks with exactly N in every row and column, of large benefit, for many tiles at once.

The sum of the benefits under a mask is what is made large: a transportation problem. Greedy by
benefit comes to at least half of the optimum (Hubara et al. 2021) but leaves rows and columns
short, which swaps repair. Then what can still be gained is gained by moving one weight in each of
two or more rows around a cycle, which leaves all sums as they are; a mask without such a cycle of
any length is optimal. Cycles of up to `CYCLE` rows are looked for.

Benefits are integers, so that the outcome is the same on every device. The loops are over rows,
columns and places of a tile, never over tiles.
"""

import torch
from torch import Tensor

CYCLE = 8  # up to M = 8 nothing better is left, then
# Less than any sum of moves can make up for, and far enough from the end of int64.
_IMPOSSIBLE = -(1 << 56)


def greedy(benefit: Tensor, n: int) -> Tensor:
    """Take the largest entries while their row and column have room: bool `[tiles, M, M]`.

    `benefit`: int64 `[tiles, M, M]` of 0 or more. At most N a row and column; ties take the lower
    position.
    """
    tiles, m = benefit.shape[:2]
    order = benefit.flatten(1).sort(dim=1, descending=True, stable=True).indices
    used = torch.zeros(2, tiles, m, dtype=torch.int8, device=benefit.device)
    mask = torch.zeros(tiles, m * m, dtype=torch.bool, device=benefit.device)
    for place in order.t():
        at = (place[:, None] // m, place[:, None] % m)
        taken = (used[0].gather(1, at[0]) < n) & (used[1].gather(1, at[1]) < n)
        for count, index in zip(used, at):
            count.scatter_add_(1, index, taken.to(torch.int8))
        mask.scatter_(1, place[:, None], taken)
    return mask.view(tiles, m, m)


def repair_(benefit: Tensor, mask: Tensor, n: int) -> None:
    """Fill rows and columns that are short, in place, until every one has exactly N.

    A free place whose row and column are both short is taken, the best one first. Where a tile
    has none, take its first short row i and short column j: another place (a, b) of the mask
    makes room for (i, b) and (a, j). One such always exists. The rows that are free at column j
    are at least M - N + 1, and none is short, or its place would be taken; each has N places,
    while at most N - 1 columns are used by row i: so it uses one that row i does not.
    """
    tiles = _short(mask, n).nonzero().view(-1)
    while tiles.numel():
        here, gains = mask[tiles], benefit[tiles]
        rows, columns = here.sum(2) < n, here.sum(1) < n
        direct = rows[:, :, None] & columns[:, None, :] & ~here
        fill = torch.where(direct, gains, -1).flatten(1).argmax(1)
        fills = direct.flatten(1).any(1)
        # argmax: the first of equal ones.
        every = torch.arange(len(tiles), device=mask.device)
        i, j = rows.to(torch.int8).argmax(1), columns.to(torch.int8).argmax(1)
        row, column = gains[every, i], gains[every, :, j]
        swap = here & ~here[every, i][:, None, :] & ~here[every, :, j][:, :, None]
        swapped = row[:, None, :] + column[:, :, None] - gains
        place = torch.where(swap, swapped, _IMPOSSIBLE).flatten(1).argmax(1)
        a, b = place // mask.shape[1], place % mask.shape[1]
        flat = here.flatten(1)
        flat[every[fills], fill[fills]] = True
        here = flat.view_as(here)
        t = every[~fills]
        here[t, a[t], b[t]] = False
        here[t, i[t], b[t]] = True
        here[t, a[t], j[t]] = True
        mask[tiles] = here
        tiles = tiles[_short(here, n)]


def _short(mask: Tensor, n: int) -> Tensor:
    """bool `[tiles]`: whether a row is short; then a column is too."""
    return (mask.sum(2) < n).any(1)


def improve_(benefit: Tensor, mask: Tensor, cycle: int = CYCLE) -> None:
    """Move weights around cycles of rows while that gains, in place; counts stay.

    The shortest cycle that gains is taken, of those the one that gains most. As none shorter
    gains, its rows are distinct.
    """
    tiles = torch.arange(len(mask), device=mask.device)
    while tiles.numel():
        # With tiles last what is done to a place is done to a long row of them.
        here = mask[tiles].permute(1, 2, 0).contiguous()
        gains, columns = _moves(benefit[tiles].permute(1, 2, 0).contiguous(), here)
        changed = torch.zeros(len(tiles), dtype=torch.bool, device=mask.device)
        for t, rows in _cycles(gains, min(cycle, mask.shape[1])):
            for to, of in zip(rows, [*rows[1:], rows[0]]):
                column = columns[to, of, t].long()
                here[of, column, t] = False
                here[to, column, t] = True
            changed[t] = True
        mask[tiles] = here.permute(2, 0, 1)
        tiles = tiles[changed]


def _moves(benefit: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What row i gains by taking over a place of row a, at best: gain and column `[i, a, tiles]`.

    The place's column is one that a uses and i does not. Arguments: `[M, M, tiles]`.
    """
    gains = torch.empty_like(benefit)
    columns = torch.empty_like(benefit, dtype=torch.int8)
    for a in range(len(mask)):
        possible = mask[a] & ~mask
        gain = torch.where(possible, benefit - benefit[a], _IMPOSSIBLE)
        gains[:, a], best = gain.max(1)
        columns[:, a] = best
    return gains, columns


def _cycles(moves: Tensor, longest: int) -> list[tuple[Tensor, list[Tensor]]]:
    """The best of the shortest cycles that gain: (tiles, rows one after the other) a length.

    Each row of a cycle takes over a place of the next one, the last one of the first.
    """
    found: list[tuple[Tensor, list[Tensor]]] = []
    m = len(moves)
    tiles = torch.arange(moves.shape[2], device=moves.device)
    walks, via = moves, []  # the best walks from row i to row c, and the rows before c
    for length in range(2, longest + 1):
        # Walks of length - 1 moves, and one from their end back to their start.
        best, at = (walks + moves.transpose(0, 1)).flatten(0, 1).max(0)
        gains = best > 0
        t, first, row = gains.nonzero().view(-1), at[gains] // m, at[gains] % m
        rows = [row]
        for before in reversed(via):
            row = before[first, row, t].long()
            rows.append(row)
        found.append((tiles[t], [first, *reversed(rows)]))
        if length == longest or len(t) == len(tiles):
            break
        if len(t):
            rest = (~gains).nonzero().view(-1)
            tiles, moves, walks = tiles[rest], moves[:, :, rest], walks[:, :, rest]
            via = [before[:, :, rest] for before in via]
        longer = walks[:, :1] + moves[:1]
        through = torch.zeros_like(walks, dtype=torch.int8)
        for middle in range(1, m):
            other = walks[:, middle, None] + moves[middle]
            through.masked_fill_(other > longer, middle)
            longer = torch.maximum(longer, other)
        walks, via = longer, [*via, through]
    return found
