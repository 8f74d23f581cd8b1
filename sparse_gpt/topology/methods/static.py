"""Static sparsity: a random mask of exact count, fixed."""

from dataclasses import dataclass

from sparse_gpt.topology.methods.base import Method


@dataclass(frozen=True)
class Static(Method):
    """Weights outside the mask, and their moments, are exactly zero from the start."""

    name = "static"
    dynamic = False
