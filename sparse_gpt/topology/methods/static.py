"""Static sparsity: a random mask of exact count, fixed."""

from sparse_gpt.topology.methods.base import Method

STATIC = Method(name="static", growth="none")
