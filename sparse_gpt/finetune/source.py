"""The pretrained weights that fine-tuning starts from."""

from collections.abc import Sequence
from pathlib import Path

from sparse_gpt.errors import UserError
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.topology.masks import SavedLayer, unfinished
from sparse_gpt.train.build import WeightSource
from sparse_gpt.train.checkpoint_files import open_checkpoint


def open_source(path: Path) -> WeightSource:
    """A checkpoint of ours, or a Hugging Face GPT-2 folder."""
    if (path / "config.json").is_file():
        return ImportedWeights(path)
    reader = open_checkpoint(path)
    reader.check_model()
    return reader


def check_masks(mode: str, checkpoint: str, layers: Sequence[SavedLayer]) -> None:
    """Refuse weights without masks to keep, or with those of a sparsity yet to be reached."""
    if not layers:
        raise UserError(f"mode: {mode}, but {checkpoint} has no masks to keep; set mode: dense")
    problem = unfinished(layers)
    if problem:
        raise UserError(
            f"mode: {mode}, but {checkpoint} was {problem}; train it to the end, or set mode: dense"
        )
