"""Sparse linear algebra as functions: knows tensors and patterns, no model and no method."""

from sparse_gpt.ops.compact import ACTIVATIONS, CompactKernel, Growth, Operand
from sparse_gpt.ops.dispatch import (
    COMPACT,
    KERNELS,
    Kernel,
    refusals,
    resolve_compact,
    resolve_kernel,
)
from sparse_gpt.ops.layout import BlockLayout
from sparse_gpt.ops.pattern import Pattern
from sparse_gpt.ops.power import inverse_power, power

__all__ = [
    "ACTIVATIONS",
    "COMPACT",
    "KERNELS",
    "BlockLayout",
    "CompactKernel",
    "Growth",
    "Kernel",
    "Operand",
    "Pattern",
    "inverse_power",
    "power",
    "refusals",
    "resolve_compact",
    "resolve_kernel",
]
