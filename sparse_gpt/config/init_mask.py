"""Sections of a first topology that is not random (`sparsity.init_mask`), and what it refuses."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sparse_gpt.config.section import Positive, Section

if TYPE_CHECKING:
    from sparse_gpt.config.sparsity import SparsityConfig


class ScoringConfig(Section):
    """What a first topology of `init_mask: snip`, `grasp` or `force` is scored on.

    `batches`: global batches whose mean gradient is looked at, the run's own first ones, which it
    will train on all the same; FORCE takes as many new ones each of its `rounds`.
    """

    batches: Positive = 1
    rounds: Annotated[int, Field(ge=2)] = 60


class LotteryConfig(Section):
    """A ticket: the mask of another run's largest weights at its end, and weights from its start.

    `final`: that run's folder, or a checkpoint's. `rewind`: a checkpoint of an early step of it,
    whose weights are trained again; without one they are the initial ones of this run's seed.
    """

    final: Path
    rewind: Path | None = None


def check_init_mask(config: "SparsityConfig") -> None:
    """Refuse, by `ValueError`, first topologies that a method or structure cannot start from."""
    kind = config.init_mask
    if (config.lottery is not None) != (kind == "lottery"):
        raise ValueError(
            "init_mask: lottery needs lottery: {final: <run folder>}"
            if config.lottery is None
            else f"lottery is set, but init_mask is {kind}"
        )
    if config.scoring.batches != 1 and kind not in ("snip", "grasp", "force"):
        raise ValueError(f"scoring.batches is set, but init_mask: {kind} looks at no batch")
    if config.scoring.rounds != ScoringConfig().rounds and kind != "force":
        raise ValueError(f"scoring.rounds is set, but init_mask is {kind}, not force")
    if kind == "random":
        return
    if config.sparsity == 0.0:
        raise ValueError(f"init_mask: {kind} needs a sparsity; set sparsity, or init_mask: random")
    if config.algorithm not in ("static", "set", "rigl"):
        raise ValueError(
            f"init_mask: {kind} is a topology of the final count, which {config.algorithm} does "
            "not start from; use static, set or rigl"
        )
    if config.structure.n_m is not None or config.structure.balanced != "none":
        key = "n_m" if config.structure.n_m is not None else "balanced"
        raise ValueError(
            f"init_mask: {kind} compares the weights of the whole model, and structure.{key} "
            "fixes how many of a group stay; use structure type unstructured or block"
        )
    if config.powerpropagation != 1.0:
        raise ValueError(
            f"init_mask: {kind} scores weights, and powerpropagation trains powers of them; "
            "leave one of them out"
        )
    if kind == "grasp" and config.structure.type == "block":
        raise ValueError(
            "init_mask: grasp has signed scores of single weights, a block's norm would lose "
            "the sign; use structure type unstructured, or init_mask: snip or force"
        )
    if config.distribution != "uniform" or config.layer_sparsity:
        key = "layer_sparsity" if config.layer_sparsity else f"distribution: {config.distribution}"
        raise ValueError(
            f"init_mask: {kind} shares the active weights out by its scores, {key} in another "
            "way; leave one of them out"
        )
