"""Saving and loading a run: complete or invisible, and exact."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.shards import Shards
from sparse_gpt.train import checkpoint_files as files
from sparse_gpt.train.checkpoint_folder import CheckpointFolder, Unconfirmed
from sparse_gpt.train.every_rank import on_every_rank
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.manifest import FORMAT, write_manifest
from sparse_gpt.train.optim import optimizer_steps, set_optimizer_steps, steps_by_phase
from sparse_gpt.train.past_masks import load_past, past_masks
from sparse_gpt.train.young_weights import YoungWeights


class Checkpointer:
    """Writes and reads the checkpoints of one run, on every rank together."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        shards: Shards,
        controller: TopologyController,
        gpt_config: GPTConfig,
        identity: dict[str, Any],
        young: YoungWeights | None = None,
        on_file: Callable[[], None] = lambda: None,
    ) -> None:
        """`identity`: what a resumed run must share; see `Trainer` and `drift.check_drift`.

        `on_file` is called before each file that this rank writes.
        """
        self.folder, self.keep_last = folder, keep_last
        self.disk = CheckpointFolder(folder)
        self.shards, self.controller = shards, controller
        self.gpt_config, self.identity, self.young = gpt_config, identity, young
        self.on_file = on_file
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def save(self, step: int, state: dict[str, Any], tag: str | None = None) -> Path:
        """Write and publish a checkpoint. A collective.

        With a `tag` it is `<tag>-<step>`, outside the rotation, and the one of that tag.
        Every rank raises if any rank failed; the previous checkpoints are untouched then. Where
        the disk did not confirm the name of the new one, it is there beside them (`Unconfirmed`
        of the first rank, whose message says so).
        """
        name = files.step_folder(step, tag or "step")
        temporary = self.folder / f"{name}.tmp"
        self._on_first(lambda: self._prepare(temporary))
        error, written = "", {}
        ever = self.controller.ever.counts(self.controller.masks, self.shards)
        try:
            written = self._write(temporary, ever)
        except Exception as problem:  # every rank must learn of it before anyone raises
            error = f"rank {self.rank}: {problem}"
        reports: list[Any] = [None] * self.world_size
        dist.all_gather_object(reports, (error, written))
        errors = [report[0] for report in reports if report[0]]
        if errors:
            self._on_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise UserError(self._not_saved(step, "; ".join(errors)))
        entries = {key: entry for report in reports for key, entry in report[1].items()}
        final = self.folder / name
        digest = self.controller.digest()
        layers = _layer_entries(self.controller, ever)
        self._on_first(
            lambda: self._publish(temporary, final, step, state, entries, digest, layers)
        )
        return final

    def _on_first(self, action: Callable[[], None]) -> None:
        on_first_rank(action, f"checkpoint folder {self.folder}")

    def _not_saved(self, step: int, problem: object) -> str:
        return (
            f"checkpoint folder {self.folder}: step {step} was not saved: {problem}. The "
            "checkpoints before it are as they were: mend that, and start the run again"
        )

    def check_space(self, best: bool) -> None:
        """Before a run: room for the checkpoints it will keep, one in the making included."""

        def check() -> None:
            self.disk.ready()  # what a killed save left takes no room
            there = len(files.list_steps(self.folder)) + len(files.list_steps(self.folder, "best"))
            self._check_free(max(1, self.keep_last + 1 + 2 * best - there))

        self._on_first(check)

    def _check_free(self, copies: int) -> None:
        needed, free = copies * self.bytes_needed(), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{copies} more checkpoints need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are "
                "free; make room, lower checkpoint.keep_last or move output_dir"
            )

    def _prepare(self, temporary: Path) -> None:
        self.disk.ready()
        self._check_free(1)
        temporary.mkdir()

    def bytes_needed(self) -> int:
        """Bytes of one checkpoint, all ranks: 12 a parameter, 2 bits a unit, 4 a slot, headers."""
        weights = sum(int(np.prod(self.shards.shape(name))) for name in self.shards.parameters)
        bits = sum(mask.units for mask in self.controller.masks.values())
        slots = sum(layout.count for layout in self.controller.layouts.values())
        return 12 * weights + bits // 4 + 4 * slots + (1 << 20)

    def _write(self, folder: Path, ever: dict[str, int]) -> dict[str, dict[str, Any]]:
        written = {}
        mine = list(self._owned())
        for kind in files.KINDS:
            tensors = {name: parts[kind].float().cpu().numpy() for name, _, parts in mine}
            ranges = {name: (start, tensors[name].size) for name, start, _ in mine}
            file = f"{kind}-{self.rank:05d}.safetensors"
            written[file] = self._file(folder / file, tensors, ranges)
        masks, past = self.controller.masks, past_masks(self.controller, ever)
        topology = {"topology": masks, "trained": self.controller.trained, "ever": past}
        for kind, masks in topology.items():
            bits, ranges = {}, {}
            for index, (name, mask) in enumerate(masks.items()):
                replicated = self.shards.replicated or not mask.sharded
                if mask.bits.numel and (not replicated or index % self.world_size == self.rank):
                    bits[name] = mask.bits.data.cpu().numpy()
                    ranges[name] = (mask.start, mask.bits.numel)
            if masks or kind == "topology":
                file = f"{kind}-{self.rank:05d}.safetensors"
                written[file] = self._file(folder / file, bits, ranges)
        if self.controller.layouts:
            file = f"slots-{self.rank:05d}.safetensors"
            mine_of = list(self.controller.layouts.items())[self.rank :: self.world_size]
            slots = {name: layout.slots.cpu().numpy() for name, layout in mine_of}
            ranges = {name: (0, tensor.size) for name, tensor in slots.items()}
            written[file] = self._file(folder / file, slots, ranges)
        if self.young is not None:
            file = f"young-{self.rank:05d}.safetensors"
            owned = {name: start for name, start, _ in mine}
            written[file] = self._file(folder / file, _young_tensors(self.young, owned))
        file = f"rng-{self.rank:05d}.safetensors"
        written[file] = self._file(folder / file, _rng_state())
        return written

    def _file(
        self,
        path: Path,
        tensors: dict[str, np.ndarray],
        ranges: dict[str, tuple[int, int]] | None = None,
    ) -> dict[str, Any]:
        self.on_file()
        return files.write_tensors(path, tensors, ranges)

    def _owned(self) -> Any:
        """(name, start, tensors) this rank writes; replicated parameters go to one rank each."""
        replicated = self.shards.replicated
        for index, (name, fragment) in enumerate(self.shards.fragments()):
            if not replicated or index % self.world_size == self.rank:
                yield name, fragment.start, fragment.tensors()

    def _publish(
        self,
        temporary: Path,
        final: Path,
        step: int,
        state: dict[str, Any],
        entries: dict[str, Any],
        digest: str,
        layers: dict[str, dict[str, Any]],
    ) -> None:
        manifest = {
            "format": FORMAT,
            "step": step,
            "state": state,
            "optimizer_steps": optimizer_steps(self.shards.base_optimizer),
            "phase_steps": steps_by_phase(self.shards.base_optimizer),
            "world_size": self.world_size,
            "gpt_config": dataclasses.asdict(self.gpt_config),
            "parameters": {name: self.shards.shape(name) for name in self.shards.parameters},
            "layers": layers,
            "topology_digest": digest,
            "files": entries,
            **self.identity,
        }
        try:
            write_manifest(temporary, manifest)
            replaced = self.disk.publish(temporary, final)
        except Unconfirmed:
            raise
        except (OSError, UserError) as problem:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"step {step} was not saved: {problem}") from None
        tag = final.name.split("-")[0]
        self.disk.retire(
            final, replaced, self.keep_last, superseded=files.UNSURE if tag == "step" else ""
        )

    def newest(self, tag: str = "step") -> Path | None:
        """The newest published checkpoint (of a tag), as rank 0 sees it. A collective."""

        def find() -> str | None:
            found = self.disk.newest(tag)
            return str(found) if found else None

        found = on_first_rank(find, f"checkpoint folder {self.folder}")
        return Path(found) if found else None

    def last(self) -> Path | None:
        """The checkpoint that a run goes on from. A collective."""
        found = [path for path in (self.newest(), self.newest(files.UNSURE)) if path is not None]
        return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)

    def forget_unsure(self) -> None:
        """Remove what is not to be gone on from any more. A collective."""
        self._on_first(lambda: self.disk.remove(files.UNSURE))

    def load(self, path: Path) -> dict[str, Any]:
        """Restore weights, moments, topology and generators; returns the saved manifest.

        A collective. Works at any number of ranks and any ZeRO stage.
        """
        reader = self._open_verified(path)
        saved = {name: list(reader.dense_shape(name)) for name in reader.names}
        layouts = self.controller.layouts
        mine = {
            name: list(layouts[name].shape if name in layouts else self.shards.shape(name))
            for name in self.shards.parameters
        }
        if saved != mine:
            raise UserError(f"checkpoint {path} is of another model: its parameters differ")
        if reader.manifest.get("optimizer_steps") is None:
            raise UserError(f"checkpoint {path} has weights alone: no run can go on from it")
        self._check_layers(path, dict(reader.manifest["layers"]))
        counts = {name: layer.active for name, layer in reader.layers.items()}
        read: dict[str, Any] = {}
        on_every_rank(lambda: read.update(self.controller.read(reader)), f"checkpoint {path}")
        trained = None
        if self.controller.keeps_trained:
            trained = ({}, {name: layer.trained or 0 for name, layer in reader.layers.items()})
            on_every_rank(
                lambda: trained[0].update(self.controller.read(reader, trained=True)),
                f"checkpoint {path}",
            )
        try:
            self.controller.load(read, counts, trained)
        except UserError as error:  # on every rank
            raise UserError(f"broken checkpoint {path}: {error}") from None
        if self.controller.digest() != reader.manifest["topology_digest"]:
            raise UserError(f"broken checkpoint {path}: the topology's digest is wrong")
        load_past(self.controller, reader)
        with torch.no_grad():
            on_every_rank(lambda: self._read_slots(reader), f"checkpoint {path}")
            on_every_rank(lambda: self._copy_fragments(reader), f"checkpoint {path}")
            self.controller.zero_outside()
            self.shards.push_masters()
        steps = reader.manifest["optimizer_steps"], reader.manifest.get("phase_steps")
        set_optimizer_steps(self.shards.base_optimizer, *steps)
        if reader.manifest.get("world_size") == self.world_size:
            try:
                _set_rng_state(reader.rng(self.rank))
            except RuntimeError as error:
                raise UserError(f"broken checkpoint {path}: a generator's state: {error}") from None
        return reader.manifest

    def _read_slots(self, reader: files.CheckpointReader) -> None:
        """The order of compact storage; where it was masked, the canonical one stays."""
        for name, layer in reader.layers.items():
            if not layer.compact or name not in self.controller.layouts:
                continue
            slots = reader.slots(name)
            try:
                self.controller.set_slots(name, slots)
            except UserError as error:
                raise UserError(f"broken checkpoint {reader.path}: {error}") from None

    def _copy_fragments(self, reader: files.CheckpointReader) -> None:
        for name, fragment in self.shards.fragments():
            for kind, tensor in fragment.tensors().items():
                tensor.copy_(self._part(reader, name, kind, fragment.start, fragment.numel))
        if self.young is not None:
            self.young.layers.clear()
            for name, (positions, births) in reader.young().items():
                self.young.load(name, positions, births)

    def _part(
        self, reader: files.CheckpointReader, name: str, kind: str, start: int, numel: int
    ) -> torch.Tensor:
        """fp32 `[numel]`: a range of a parameter as this run stores it, converted where it was
        stored otherwise: then the whole parameter is read."""
        layer, layout = reader.layers.get(name), self.controller.layouts.get(name)
        if layer is None or layer.compact == (layout is not None):
            return reader.fragment(name, kind, start, numel)
        dense = reader.stored(name, kind)
        whole = dense if layout is None else layout.gather(dense)
        return whole.flatten()[start : start + numel]

    def _check_layers(self, path: Path, saved: dict[str, Any]) -> None:
        """Refuse a topology of other layers, blocks or final counts than this run's."""
        mine = _layer_entries(self.controller, {})
        for entries in (saved, mine):  # how many are active now depends on the step
            entries.update({name: _what_stays(entry) for name, entry in entries.items()})
        differing = [
            name for name in sorted(saved.keys() | mine.keys()) if saved.get(name) != mine.get(name)
        ]
        if differing:
            raise UserError(
                f"checkpoint {path} has another sparsity in {len(differing)} layers "
                f"({differing[0]}: {saved.get(differing[0])}, this run {mine.get(differing[0])}); "
                "keep sparsity.sparsity, sparsity.structure and sparsity.param_filter as they were"
            )

    def _open_verified(self, path: Path) -> files.CheckpointReader:
        """Open a checkpoint; the ranks share the work of checking its digests."""
        error = ""
        reader = None
        try:
            reader = files.open_checkpoint(path, verify=False)
            reader.verify(sorted(reader.files)[self.rank :: self.world_size])
        except UserError as problem:
            error = str(problem)
        errors: list[Any] = [None] * self.world_size
        dist.all_gather_object(errors, error)
        problems = sorted({e for e in errors if e})
        if problems:
            raise UserError(
                f"{'; '.join(problems)}. Nothing was changed. To go on from an earlier "
                f"checkpoint, move {path} away and start again"
            )
        assert reader is not None
        return reader


def _layer_entries(
    controller: TopologyController, ever: dict[str, int]
) -> dict[str, dict[str, Any]]:
    entries = {}
    for name, mask in controller.masks.items():
        entries[name] = {
            "grid": list(mask.grid),
            "block": list(mask.block),
            "active": mask.active,
            "target": controller.targets[name],
            "stores_all": controller.method.stores_all,
            "alpha": controller.layers[name].alpha,
            "storage": "compact" if name in controller.layouts else "masked",
            "ever_active": ever.get(name),
        }
        if name in controller.trained:
            entries[name]["trained"] = controller.trained[name].active
    return entries


def _young_tensors(young: YoungWeights, owned: dict[str, int]) -> dict[str, np.ndarray]:
    """Positions in the flattened weight and births, of the layers owned from a start on."""
    tensors = {}
    for name in sorted(young.layers.keys() & owned.keys()):
        positions = young.layers[name].positions + owned[name]
        tensors[f"{name}.positions"] = positions.cpu().numpy()
        tensors[f"{name}.births"] = young.layers[name].births.cpu().numpy()
    return tensors


def _what_stays(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("grid", "block", "target", "stores_all", "alpha")}


def _rng_state() -> dict[str, np.ndarray]:
    states = {"cpu": torch.get_rng_state().numpy()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def _set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
