"""The pretrained weights that fine-tuning starts from."""

from collections.abc import Sequence
from pathlib import Path

from sparse_gpt.errors import UserError
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.topology.masks import SavedLayer
from sparse_gpt.train.build import WeightSource
from sparse_gpt.train.checkpoint_files import open_checkpoint


def open_source(path: Path) -> WeightSource:
    """A checkpoint of ours, or a Hugging Face GPT-2 folder."""
    if (path / "config.json").is_file():
        return ImportedWeights(path)
    return open_checkpoint(path)


def check_masks(checkpoint: str, layers: Sequence[SavedLayer]) -> None:
    """Refuse weights without masks to keep, or with those of a sparsity yet to be reached."""
    if not layers:
        raise UserError(f"mode: sparse, but {checkpoint} has no masks to keep; set mode: dense")
    active = sum(layer.active for layer in layers)
    target = sum(layer.active if layer.target is None else layer.target for layer in layers)
    if active != target:
        raise UserError(
            f"mode: sparse, but {checkpoint} was saved before its method reached its sparsity "
            f"({active:,} active blocks, {target:,} at the end); train it to the end, or set "
            "mode: dense"
        )
