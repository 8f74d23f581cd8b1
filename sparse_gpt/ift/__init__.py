"""Sparse-IFT members: from the dimensions of the dense base model to those of the sparse one.

`MEMBERS[name](dims, sparsity, heads=..., multiple_of=...) -> dims`.
"""

from collections.abc import Callable

from sparse_gpt.ift.wide import widen


def unchanged(
    dims: dict[str, int],
    sparsity: float,
    heads: str = "keep",
    multiple_of: int | None = None,
) -> dict[str, int]:
    """No transformation: the base model's own dimensions, whatever the sparsity."""
    return dict(dims)


Member = Callable[..., dict[str, int]]

MEMBERS: dict[str, Member] = {"none": unchanged, "wide": widen}

__all__ = ["MEMBERS", "Member", "unchanged", "widen"]
