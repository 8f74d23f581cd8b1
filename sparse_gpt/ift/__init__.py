"""Sparse-IFT members: from the dense base model to the sparse one of the same FLOPs.

`MEMBERS[name](dims, sparsity, heads=..., multiple_of=...) -> dims` gives the dimensions, `forms`
what the layers of the members in `FORMS` are made of.
"""

from collections.abc import Callable

from sparse_gpt.ift.forms import FORMS, Transform
from sparse_gpt.ift.wide import widen


def unchanged(
    dims: dict[str, int],
    sparsity: float,
    heads: str = "keep",
    multiple_of: int | None = None,
) -> dict[str, int]:
    """No other widths: the base model's own dimensions, whatever the sparsity."""
    return dict(dims)


Member = Callable[..., dict[str, int]]

MEMBERS: dict[str, Member] = {
    "none": unchanged,
    "wide": widen,
    "parallel": unchanged,
    "factorized": unchanged,
    "doped": unchanged,
    "low_rank": widen,
}

__all__ = ["FORMS", "MEMBERS", "Member", "Transform", "unchanged", "widen"]
