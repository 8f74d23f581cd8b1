"""The manifest of a checkpoint: what it must hold, and how it is written and read.

It names the size and sha256 of every other file, so it carries a sha256 of its own: a damaged
manifest is refused like a damaged tensor. Unknown keys are refused too, so that not even the
digest's own key can change unnoticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json

FORMAT = 3
NAME = "manifest.json"

Count = Annotated[int, Field(ge=0, lt=2**63)]
LARGEST = 64 << 20  # bytes; files and layers of thousands of ranks


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FileEntry(_Strict):
    """One file of the checkpoint's folder."""

    size: Count
    sha256: str


class LayerEntry(_Strict):
    """One sparse layer: blocks of its grid, the block's shape, and active blocks.

    `target`: active blocks when the method is done; `trained`: those in the trained set where it
    is kept apart; `stores_all`: whether inactive weights have values; `alpha`: Powerpropagation's;
    `storage`: whether the parameter is the whole weight, or its active blocks by slot;
    `ever_active`: blocks that were active at any time.
    """

    grid: tuple[Count, Count]
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    active: Count
    target: Count | None = None
    trained: Count | None = None
    stores_all: bool = False
    alpha: Annotated[float, Field(ge=1.0)] = 1.0
    storage: Literal["masked", "compact"] = "masked"
    ever_active: Count | None = None


class Manifest(_Strict):
    """Everything a checkpoint says about itself. What only resuming needs may be absent."""

    format: Literal[3]
    step: Count
    state: dict[str, Any]
    gpt_config: dict[str, Any]
    parameters: dict[str, tuple[Count, ...]]
    layers: dict[str, LayerEntry]
    topology_digest: str  # see TopologyController.digest
    files: dict[str, FileEntry]
    config: dict[str, Any]
    eos_id: Annotated[int, Field(ge=0, lt=2**30)] | None = None
    optimizer_steps: Count | None = None
    phase_steps: list[Count] | None = None  # of the parameters of each phase of unfreezing
    world_size: Count | None = None
    global_batch_size: Count | None = None
    data: list[Any] | None = None
    precision: str | None = None
    source: str | None = None  # identity of the weights the run started from
    tokenizer_sha256: str | None = None
    sha256: str


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 over every entry but the digest itself, whatever the layout of the text."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it durably, with its digest."""
    write_json(folder / NAME, {**manifest, "sha256": digest_of(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked.

    Raises `UserError` naming the file where it is missing, damaged, or of another format.
    """
    path = folder / NAME
    try:
        manifest = read_json(path, LARGEST)
        if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
            found = repr(manifest["format"])[:40]
            raise UserError(f"{path}: format {found}, this version reads {FORMAT}")
        Manifest.model_validate_json(json.dumps(manifest))
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {folder}: no {NAME} there") from None
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"broken checkpoint: {path} is not a manifest ({where[:200]}: {first['msg']})"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"broken checkpoint: {path} is not a manifest ({error})") from None
    if manifest["sha256"] != digest_of(manifest):
        raise UserError(f"broken checkpoint: the sha256 of {path} is wrong (damaged or edited)")
    return manifest
