"""Sparse training methods, by the name `sparsity.algorithm` gives them."""

from sparse_gpt.topology.methods.base import Method
from sparse_gpt.topology.methods.rigl import RIGL
from sparse_gpt.topology.methods.set import SET
from sparse_gpt.topology.methods.static import STATIC

METHODS: dict[str, Method] = {method.name: method for method in (STATIC, SET, RIGL)}

__all__ = ["METHODS", "Method"]
