"""The first topology: a random mask of exact count, from (seed, layer name)."""

import torch

from sparse_gpt.ops import Pattern
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.structure import BlockStructure, top_units


def random_pattern(
    name: str, shape: tuple[int, int], structure: BlockStructure, units: int, seed: int
) -> Pattern:
    """The `units` blocks of a layer's grid with the highest random scores; on the CPU."""
    rows, cols = structure.grid(shape)
    scores = random_scores(seed, 0, name, 0, rows * cols).view(rows, cols)
    active = top_units(scores, units)
    return Pattern(active.to(torch.bool), structure.block)
