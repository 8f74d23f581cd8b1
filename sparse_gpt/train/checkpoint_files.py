"""Checkpoints on disk: what the files are, and reading them. Knows no engine.

    step-00000300/
      manifest.json                     sizes and sha256 of every file, shapes, state, config
      master-00000.safetensors          rank 0's fragments of the fp32 weights, by parameter name
      exp_avg-00000, exp_avg_sq-00000   of Adam's moments
      topology-00000.safetensors        rank 0's share of every mask, as bits
      slots-00000.safetensors           of compact storage: which block lies in which slot, int32
      trained-00000.safetensors         of the trained sets, where a method keeps them apart
      ever-00000.safetensors            which units were active at any time, where not all still are
      young-00000.safetensors           weights that grew lately (`optimizer.growth: smet`)
      rng-00000.safetensors             rank 0's generator states

A fragment is a range of the flattened parameter, so a checkpoint can be read back at any number
of ranks and any ZeRO stage, and in masked or compact storage, whichever it was written in. A
folder is written as `step-N.tmp` and renamed once every rank is done: what has the final name is
complete. Everything is safetensors and JSON: loading runs no code. Every file is checked against
the manifest before it is used.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from sparse_gpt.durable import fsync_path, sha256_file
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import parse_object
from sparse_gpt.model.gpt import GPT, GPTConfig, check_modules
from sparse_gpt.ops import BlockLayout, Pattern, power
from sparse_gpt.topology.masks import SavedLayer
from sparse_gpt.train.chosen_run import check_chosen, chosen_run
from sparse_gpt.train.manifest import NAME, read_manifest

KINDS = ("master", "exp_avg", "exp_avg_sq")
# The tag of a save after non-finite steps: a run goes on from it, but a rollback goes back farther.
UNSURE = "unsure"
# Elements: one long read would let no other thread say that this rank is alive.
READ_AT_ONCE = 1 << 24


def step_folder(step: int, tag: str = "step") -> str:
    """Name of a checkpoint's folder: `step-00000300`, or `best-00000300` for a tag."""
    return f"{tag}-{step:08d}"


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], ranges: dict[str, tuple[int, int]] | None = None
) -> dict[str, Any]:
    """Write one file durably; returns its manifest entry `{size, sha256}`."""
    try:
        save_file(tensors, path, metadata={"ranges": json.dumps(ranges or {})})
    except SafetensorError as error:  # it names no file
        raise OSError(f"{path}: {error}") from None
    fsync_path(path)
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def list_steps(folder: Path, tag: str = "step") -> list[int]:
    """Steps of the published checkpoints (of a tag) in a folder, ascending."""
    if not folder.is_dir():
        return []
    name = re.compile(rf"^{re.escape(tag)}-(\d{{8}})$")
    matches = (name.match(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def open_checkpoint(path: Path | str, verify: bool = True) -> "CheckpointReader":
    """Open one checkpoint's folder, or a run folder.

    Of a run: the best checkpoint where it kept one (early stopping), else the newest; of a grid
    of learning rates that of the chosen one. With `verify`, every file is checked against its
    digest. Raises `UserError` naming what is missing or damaged.
    """
    path = Path(path)
    if (chosen := chosen_run(path)) is not None:
        path = chosen
    found = [
        folder / step_folder(steps[-1], tag)
        for folder in (path / "checkpoints", path)
        for tag in ("best", "step")
        if (steps := list_steps(folder, tag))
    ]
    if not found:
        check_chosen(path)
    path = found[0] if found else path
    reader = CheckpointReader(path)
    if verify:
        reader.verify(reader.files)
    return reader


def _is_range(part: Any) -> bool:
    return (
        isinstance(part, list)
        and len(part) == 2
        and all(type(number) is int and 0 <= number < 2**62 for number in part)
    )


def _within(values: np.ndarray, stop: int) -> bool:
    return not values.size or (values.min() >= 0 and values.max() < stop)


class CheckpointReader:
    """One published checkpoint: its manifest, and any range of any tensor in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.files: dict[str, dict[str, Any]] = self.manifest["files"]
        self.shapes = {name: tuple(s) for name, s in self.manifest["parameters"].items()}
        self.names = list(self.shapes)
        self._check_files()
        self._ranges: dict[str, dict[str, list[tuple[int, int, str]]]] = {}

    def _check_files(self) -> None:
        named = re.fullmatch(r"[a-z]+-(\d{8})", self.path.name)
        if named and int(named[1]) != self.manifest["step"]:
            raise UserError(
                f"broken checkpoint {self.path}: its {NAME} is that of step {self.manifest['step']}"
            )
        there = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        for name in sorted(there - self.files.keys() - {NAME}):
            raise UserError(
                f"broken checkpoint {self.path}: {name} is not of this checkpoint; move it away "
                "if it was put there by hand"
            )
        for name, entry in self.files.items():
            file = self.path / name
            if Path(name).name != name or len(name) > 200:
                raise UserError(f"broken checkpoint {self.path}: file name {name[:80]!r} is none")
            if not file.is_file():
                raise UserError(f"broken checkpoint {self.path}: {name[:80]!s} is missing")
            if file.resolve().parent != self.path.resolve():
                raise UserError(
                    f"broken checkpoint {self.path}: {name} is a link that leads out of the folder"
                )
            if file.stat().st_size != entry["size"]:
                raise UserError(
                    f"broken checkpoint {self.path}: {name} has {file.stat().st_size} bytes, "
                    f"not {entry['size']}"
                )

    def verify(self, names: Iterable[str]) -> None:
        """Check the sha256 of some files."""
        for name in names:
            if sha256_file(self.path / name) != self.files[name]["sha256"]:
                raise UserError(
                    f"broken checkpoint {self.path}: the sha256 of {name} is wrong (damaged, or "
                    "from another run)"
                )

    @property
    def gpt_config(self) -> GPTConfig:
        try:
            config = GPTConfig.from_dict(self.manifest["gpt_config"])
            check_modules(config, len(self.names))
            return config
        except (TypeError, ValueError) as error:
            raise UserError(f"broken checkpoint {self.path}: gpt_config: {error}") from None

    def check_model(self) -> None:
        """Raise `UserError` unless parameters and layers are those of the model in `gpt_config`.

        Of names and shapes alone: no tensor is read.
        """
        with torch.device("meta"):
            model = GPT(self.gpt_config)
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, layer in self.layers.items():
            stored = (layer.active, *layer.block) if layer.compact else layer.shape
            shape = self.shapes.get(name)
            if shape is None or math.prod(shape) != math.prod(stored):
                raise UserError(
                    f"broken checkpoint {self.path}: layer {name[:80]} has not the shape of its "
                    "parameter"
                )
        found = {name: self.dense_shape(name) for name in self.names}
        differing = sorted(
            n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)
        )
        if differing:
            name = differing[0]
            raise UserError(
                f"broken checkpoint {self.path}: {name[:80]} is {found.get(name)}, in the model of "
                f"gpt_config {expected.get(name)}"
            )

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer folder of the run, beside its checkpoints; None where it has none."""
        folder = self.path.parent.parent / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the tokenizer the weights were trained with; None where the data named none."""
        return self.manifest.get("tokenizer_sha256")

    @property
    def identity(self) -> str:
        """A digest that tells these weights from others."""
        return self.manifest["sha256"]

    @property
    def eos_id(self) -> int | None:
        return self.manifest.get("eos_id")

    def _locate(self, kind: str) -> dict[str, list[tuple[int, int, str]]]:
        """(start, numel, file) of every fragment of a kind, by parameter, in order."""
        if kind not in self._ranges:
            found: dict[str, list[tuple[int, int, str]]] = {}
            for file in self.files:
                if not file.startswith(f"{kind}-"):
                    continue
                try:
                    with safe_open(self.path / file, "numpy") as handle:
                        ranges = parse_object((handle.metadata() or {}).get("ranges", "{}"))
                except (SafetensorError, OSError, ValueError) as error:
                    raise UserError(f"broken checkpoint {self.path}: {file}: {error}") from None
                for name, part in ranges.items():
                    if not _is_range(part):
                        raise UserError(
                            f"broken checkpoint {self.path}: {file}: the range of {name[:80]} is "
                            "no [start, number]"
                        )
                    found.setdefault(name, []).append((*part, file))
            self._ranges[kind] = {name: sorted(parts) for name, parts in found.items()}
        return self._ranges[kind]

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / file, "numpy") as handle:
                yield handle
        except (SafetensorError, OSError) as error:
            raise UserError(f"broken checkpoint {self.path}: {file}: {error}") from None

    def _tensor(self, handle: Any, file: str, name: str, dtype: str, shape: list[int]) -> Any:
        """A tensor of an open file, not yet read; `UserError` where it is of another form."""
        part = handle.get_slice(name)
        if part.get_dtype() != dtype or part.get_shape() != shape:
            raise UserError(
                f"broken checkpoint {self.path}: {file}: {name[:80]} is {part.get_dtype()} of "
                f"{part.get_shape()}, not {dtype} of {shape}"
            )
        return part

    def _read(self, kind: str, name: str, start: int, numel: int, total: int) -> np.ndarray:
        """`[start, start + numel)` of a flattened tensor of `total` elements."""
        pieces, position = [], start
        for first, count, file in self._locate(kind).get(name, []):
            end = min(first + count, start + numel)
            if first > position or end <= position:
                continue
            with self._open(file) as handle:
                part = self._tensor(handle, file, name, "F32", [count])
                for at in range(position - first, end - first, READ_AT_ONCE):
                    pieces.append(part[at : min(at + READ_AT_ONCE, end - first)])
            position = end
        if position != start + numel or start + numel > total:
            raise UserError(
                f"broken checkpoint {self.path}: {kind} of {name} lacks elements from {position}"
            )
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)

    def fragment(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """fp32 `[numel]`: a range of a flattened parameter; kind: master, exp_avg, exp_avg_sq."""
        total = math.prod(self._shape(name))
        return torch.from_numpy(self._read(kind, name, start, numel, total))

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise UserError(f"broken checkpoint {self.path}: it has no parameter {name[:80]}")
        return self.shapes[name]

    def parameter(self, name: str, kind: str = "master") -> Tensor:
        """A whole parameter as the model computes with it, fp32, in its shape.

        Weights that are stored but take no part (Top-KAST, "Search spaces") are 0 in it, and
        Powerpropagation's are powers; `fragment` gives what was stored.
        """
        stored, layer = self.stored(name, kind), self.layers.get(name)
        if kind != "master" or layer is None:
            return stored
        if layer.stores_all:
            stored = self.pattern(name).apply(stored)
        return power(stored, layer.alpha)

    def stored(self, name: str, kind: str = "master") -> Tensor:
        """A whole parameter as it was trained, fp32; zeros where compact storage holds nothing."""
        shape, layer = self._shape(name), self.layers.get(name)
        stored = self.fragment(name, kind, 0, math.prod(shape)).view(shape)
        if layer is None or not layer.compact:
            return stored
        return BlockLayout(layer.shape, layer.block, self.slots(name)).scatter(stored)

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter in masked storage, whatever it was written in."""
        layer = self.layers.get(name)
        return self._shape(name) if layer is None or not layer.compact else layer.shape

    def slots(self, name: str) -> Tensor:
        """int32 `[slots]`: the canonical index of the block in each slot of a compact layer."""
        parts = self._locate("slots").get(name)
        if not parts:
            raise UserError(f"broken checkpoint {self.path}: the slots of {name} are missing")
        layer, file = self.layers[name], parts[0][2]
        with self._open(file) as handle:
            slots = self._tensor(handle, file, name, "I32", [layer.active])[:]
        units = layer.grid[0] * layer.grid[1]
        if len(np.unique(slots)) != slots.size or not _within(slots, units):
            raise UserError(f"broken checkpoint {self.path}: the slots of {name} are no topology")
        return torch.from_numpy(slots)

    @property
    def layers(self) -> dict[str, SavedLayer]:
        """The sparse layers, by the name of their weight."""
        return {
            name: SavedLayer(
                tuple(entry["grid"]),
                tuple(entry["block"]),
                entry["active"],
                entry.get("trained"),
                entry.get("stores_all", False),
                entry.get("alpha", 1.0),
                entry.get("target"),
                entry.get("storage") == "compact",
                entry.get("ever_active"),
            )
            for name, entry in self.manifest["layers"].items()
        }

    def patterns(self) -> dict[str, Pattern]:
        """The topology: the pattern of every sparse layer, by the name of its weight."""
        return {name: self.pattern(name) for name in self.layers}

    def pattern(self, name: str) -> Pattern:
        """The pattern of one sparse layer."""
        layer = self.layers[name]
        rows, columns = layer.grid
        flags = self.mask(name, 0, rows * columns)
        if int(flags.sum()) != layer.active:
            raise UserError(f"broken checkpoint {self.path}: the topology of {name} is incomplete")
        return Pattern(flags.view(rows, columns), layer.block)

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """bool `[count]`: units `start .. start + count - 1` of a sparse layer's A, or its B."""
        return self._flags("trained" if trained else "topology", name, start, count)

    def ever_active(self, name: str, start: int, count: int) -> Tensor:
        """bool `[count]`: whether units `start .. start + count - 1` were active at any time.

        For layers whose `ever_active` is known.
        """
        layer = self.layers[name]
        kind = "topology" if layer.ever_active == layer.active else "ever"
        return self._flags(kind, name, start, count)

    def _flags(self, kind: str, name: str, start: int, count: int) -> Tensor:
        pieces, position = [], start
        for first, many, file in self._locate(kind).get(name, []):
            end = min(first + many, start + count)
            if first > position or end <= position:
                continue
            with self._open(file) as handle:
                packed = self._tensor(handle, file, name, "U8", [-(-many // 8)])[:]
            pieces.append(np.unpackbits(packed, count=many)[position - first : end - first])
            position = end
        if position != start + count:
            raise UserError(f"broken checkpoint {self.path}: the topology of {name} is incomplete")
        flags = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8)
        return torch.from_numpy(flags).view(torch.bool)

    def young(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Young weights (`young_weights.py`) by layer, of all ranks: int64 positions in the
        flattened weight, and optimizer steps before their birth."""
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for file in self.files:
            if not file.startswith("young-"):
                continue
            with self._open(file) as handle:
                for key in handle.keys():  # noqa: SIM118
                    name, _, kind = key.rpartition(".")
                    if kind != "positions":
                        continue
                    shape = handle.get_slice(key).get_shape()[:1]
                    positions = self._tensor(handle, file, key, "I64", shape)[:]
                    births = self._tensor(handle, file, f"{name}.births", "I64", shape)[:]
                    if not _within(positions, math.prod(self._shape(name))):
                        raise UserError(
                            f"broken checkpoint {self.path}: {file}: {name[:80]}: young weights "
                            "outside the weight"
                        )
                    found.setdefault(name, []).append((positions, births))
        joined = {}
        for name, pairs in found.items():
            positions, births = (torch.from_numpy(np.concatenate(p)) for p in zip(*pairs))
            joined[name] = positions, births
        return joined

    def rng(self, rank: int) -> dict[str, Tensor]:
        """A rank's generator states as byte tensors, by device type."""
        file, states = f"rng-{rank:05d}.safetensors", {}
        if file not in self.files:
            raise UserError(f"broken checkpoint {self.path}: {file} is missing")
        with self._open(file) as handle:
            for key in handle.keys():  # noqa: SIM118
                shape = handle.get_slice(key).get_shape()[:1]
                states[key] = torch.from_numpy(self._tensor(handle, file, key, "U8", shape)[:])
        if "cpu" not in states:
            raise UserError(f"broken checkpoint {self.path}: {file} has no state of the CPU")
        return states
