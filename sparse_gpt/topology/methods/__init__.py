"""Sparse training methods, by the name `sparsity.algorithm` gives them."""

from sparse_gpt.topology.methods.ac_dc import ACDC
from sparse_gpt.topology.methods.base import Method, Sets, Update
from sparse_gpt.topology.methods.gmp import GMP
from sparse_gpt.topology.methods.granet import GraNet
from sparse_gpt.topology.methods.rigl import RigL
from sparse_gpt.topology.methods.search_spaces import SearchSpaces
from sparse_gpt.topology.methods.set import Set
from sparse_gpt.topology.methods.static import Static
from sparse_gpt.topology.methods.top_kast import TopKAST

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Static, Set, RigL, GMP, GraNet, ACDC, TopKAST, SearchSpaces)
}

__all__ = ["METHODS", "Method", "Sets", "Update"]
