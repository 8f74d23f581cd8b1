"""Gradual unfreezing: which parameters train when (paper 003, section 4.3).

Phase 0 trains the head, all biases and LayerNorms; each phase after it the linear weights of one
block more, from the last to the first; the last phase everything, embeddings included. A frozen
parameter keeps its value and zero moments. Its gradient is made and dropped: it is no part of the
norm that clipping goes by, and no weight decay reaches it. When it begins to train, Adam's bias
correction counts its own steps.

The paper's head is new and its embeddings are frozen; here they are one matrix. `tied_embedding:
head` trains it from the start, `embedding` in the last phase alone.
"""

from collections.abc import Iterable
from typing import Literal

from sparse_gpt.topology.shards import Shards


def phases(n_layer: int) -> int:
    """How many phases a model has: one before the blocks, one a block, one with everything."""
    return n_layer + 2


def phase_of(name: str, n_layer: int, tied_embedding: Literal["head", "embedding"]) -> int:
    """The phase, from 0, in which a parameter of `GPT` begins to train."""
    is_norm = ".ln_" in name or name.startswith("ln_")
    if is_norm or name.endswith("bias") or name.startswith("project_out"):
        return 0
    if name == "wte.weight":
        return 0 if tied_embedding == "head" else n_layer + 1
    if name.startswith("h."):
        return n_layer - int(name.split(".")[1])
    return n_layer + 1  # positions, and the projection behind the token embedding


def phase_at(step: int, every: int, n_layer: int) -> int:
    """The phase of step t (from 1) where one lasts `every` steps; the last has no end."""
    return min((step - 1) // every, phases(n_layer) - 1)


def zero_gradients(shards: Shards, names: Iterable[str]) -> None:
    """Zero what a rank holds of the averaged gradients of some parameters."""
    for name in names:
        gradient = shards.gradient(name)
        if gradient is not None:
            gradient.zero_()
