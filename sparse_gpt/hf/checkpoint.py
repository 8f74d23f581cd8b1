"""From a checkpoint of a run to a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.hf.export import export_folder
from sparse_gpt.hf.layout import is_gpt2
from sparse_gpt.ops import Pattern
from sparse_gpt.topology.masks import unfinished
from sparse_gpt.train.checkpoint_files import CheckpointReader, open_checkpoint


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `sparsity` is that of the sparse layers, 0 for a dense model."""

    out: Path
    step: int
    parameters: int
    active_parameters: int
    sparsity: float
    bytes: int
    has_tokenizer: bool
    stock: bool  # a GPT-2 folder, not one of our own model class
    unfinished: str = ""  # why its masks are not those its method ends with

    def summary(self) -> str:
        """One line a fact."""
        tokenizer = "" if self.has_tokenizer else " (the run has no tokenizer: weights only)"
        return (
            f"exported step {self.step} to {self.out}{tokenizer}\n"
            f"  parameters {self.parameters:,}, active {self.active_parameters:,}, "
            f"sparsity of the sparse layers {self.sparsity:.6f}\n"
            f"  {self.bytes:,} bytes"
            + ("" if self.stock else "; it loads once sparse_gpt.hf.model is imported")
            + (f"\n  warning: this checkpoint was {self.unfinished}" if self.unfinished else "")
        )


def export_checkpoint(
    checkpoint: Path | str, out: Path | str, dtype: str = "float32", overwrite: bool = False
) -> Exported:
    """Export a step folder, or the newest step of a run folder, as `export_folder` does.

    Every file is checked against its digest first. Raises `UserError` for a broken checkpoint,
    and for a weight that is not exactly zero outside its layer's pattern: the folder would not
    be the model that was trained.
    """
    reader = open_checkpoint(checkpoint)
    reader.check_model()
    patterns = reader.patterns()

    def parameter(name: str) -> Tensor:
        tensor = reader.parameter(name)
        if name in patterns:
            check_zeros(name, tensor, patterns[name])
        return tensor

    parameters = sum(torch.Size(reader.dense_shape(name)).numel() for name in reader.names)
    layers = {name: _layer(pattern) for name, pattern in patterns.items()}
    active = sum(layer["active"] for layer in layers.values())
    dense = sum(layer["shape"][0] * layer["shape"][1] for layer in layers.values())
    exported = Exported(
        out=Path(out),
        step=reader.manifest["step"],
        parameters=parameters,
        active_parameters=parameters - dense + active,
        sparsity=1 - active / dense if dense else 0.0,
        bytes=0,
        has_tokenizer=reader.tokenizer_path is not None,
        stock=is_gpt2(reader.gpt_config),
        unfinished=unfinished(reader.layers.values()),
    )
    size = export_folder(
        parameter,
        reader.gpt_config,
        Path(out),
        tokenizer_path=reader.tokenizer_path,
        dtype=dtype,
        metadata=_metadata(reader, exported, layers),
        eos_id=reader.eos_id,
        overwrite=overwrite,
    )
    return Exported(**{**vars(exported), "bytes": size})


def check_zeros(name: str, weight: Tensor, pattern: Pattern) -> None:
    """Raise `UserError` unless `weight` is exactly zero outside the pattern."""
    stray = int(torch.count_nonzero(weight)) - int(torch.count_nonzero(pattern.apply(weight)))
    if stray:
        raise UserError(
            f"{name}: {stray} weights outside its sparsity pattern are not zero; the checkpoint "
            "is damaged or was not written by this program"
        )


def _layer(pattern: Pattern) -> dict[str, Any]:
    """Achieved counts of a layer; from the mask, since an active weight may be zero."""
    return {
        "shape": list(pattern.shape),
        "block": list(pattern.block),
        "active": int(pattern.active.sum()) * pattern.block[0] * pattern.block[1],
    }


def _metadata(
    reader: CheckpointReader, exported: Exported, layers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    state = reader.manifest["state"]
    return {
        "format": 1,
        "step": exported.step,
        "tokens": state.get("tokens"),
        "flops_spent": state.get("flops_spent"),
        "parameters": exported.parameters,
        "active_parameters": exported.active_parameters,
        "sparsity": exported.sparsity,
        "layers": layers,
        "topology_digest": reader.manifest["topology_digest"],
        "config": reader.manifest["config"],
    }
