"""Sparse linear algebra as functions: knows tensors and patterns, no model and no method."""

from sparse_gpt.ops.dispatch import KERNELS, Kernel, resolve_kernel
from sparse_gpt.ops.pattern import Pattern
from sparse_gpt.ops.power import inverse_power, power

__all__ = ["KERNELS", "Kernel", "Pattern", "inverse_power", "power", "resolve_kernel"]
