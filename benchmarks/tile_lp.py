"""The best N:M total a tile can have, by linear programming: what fast masks are held against."""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array
from torch import Tensor


def best_totals(benefit: Tensor, n: int) -> np.ndarray:
    """The LP's optimum for each tile, `[tiles]`; its corners are masks.

    All tiles are one program, whose rows and columns have a sum of N, entries 0 to 1.
    """
    tiles, m = benefit.shape[:2]
    place = np.arange(benefit.numel()).reshape(tiles, m, m)
    row = place // m  # of tile and row
    column = place // (m * m) * m + place % m + tiles * m
    where = np.concatenate([row, column]).ravel(), np.tile(place, (2, 1, 1)).ravel()
    sums = csr_array((np.ones(2 * place.size), where))
    costs = -benefit.double().numpy().ravel()
    solved = linprog(costs, A_eq=sums, b_eq=np.full(2 * tiles * m, n), bounds=(0, 1))
    assert solved.status == 0, solved.message
    return -(costs * solved.x).reshape(tiles, -1).sum(1)
