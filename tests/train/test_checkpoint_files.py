"""Checkpoints on disk: exact round trips at any cut, and every kind of damage refused by name."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.errors import UserError
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.ops import Pattern
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.masks import SavedLayer
from sparse_gpt.train import checkpoint_files as files
from sparse_gpt.train.manifest import FORMAT, read_manifest, write_manifest

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 9)}


def values(seed):
    generator = np.random.default_rng(seed)
    return {
        (kind, name): generator.standard_normal(shape).astype(np.float32)
        for kind in files.KINDS
        for name, shape in SHAPES.items()
    }


def write_mask(folder, rank, flags, start, end, name="a.weight"):
    """One rank's bits of a mask, as the controller holds them; returns the manifest's entry."""
    file = f"topology-{rank:05d}.safetensors"
    bits = Bits.of(flags[start:end]).data.numpy()
    written = files.write_tensors(folder / file, {name: bits}, {name: (start, end - start)})
    return {file: written}


def write_checkpoint(folder, seed=0, ranks=3, block=(1, 1), step=5):
    """A complete checkpoint of random tensors, cut into uneven fragments; returns the values."""
    folder.mkdir(parents=True)
    tensors = values(seed)
    mask = torch.from_numpy(np.random.default_rng(seed + 9).random((7, 5)) < 0.4)
    pattern = Pattern(mask, block)
    entries = {}
    for rank in range(ranks):
        for kind in files.KINDS:
            parts, ranges = {}, {}
            for name, shape in SHAPES.items():
                size = int(np.prod(shape))
                start, end = rank * size // ranks, (rank + 1) * size // ranks
                parts[name] = tensors[kind, name].reshape(-1)[start:end]
                ranges[name] = (start, end - start)
            file = f"{kind}-{rank:05d}.safetensors"
            entries[file] = files.write_tensors(folder / file, parts, ranges)
        start, end = rank * mask.numel() // ranks, (rank + 1) * mask.numel() // ranks
        entries |= write_mask(folder, rank, mask.reshape(-1), start, end)
        file = f"rng-{rank:05d}.safetensors"
        state = {"cpu": np.arange(rank, rank + 16, dtype=np.uint8)}
        entries[file] = files.write_tensors(folder / file, state)
    config = GPTConfig(1, 1, 4, 16, vocab_size=11, n_positions=6)
    write_manifest(
        folder,
        {
            "format": FORMAT,
            "step": step,
            "state": {"step": step, "samples": 40},
            "optimizer_steps": step,
            "world_size": ranks,
            "gpt_config": dataclasses.asdict(config),
            "parameters": {name: list(shape) for name, shape in SHAPES.items()},
            "layers": {
                "a.weight": {"grid": [7, 5], "block": list(block), "active": int(mask.sum())}
            },
            "topology_digest": "0" * 64,
            "files": entries,
            "config": {"name": "test"},
            "data": ["digest"],
            "global_batch_size": 8,
        },
    )
    return tensors, pattern


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoints" / files.step_folder(5)
    write_checkpoint(path)
    return path


def recut(folder, flags, ranges):
    """Replace a checkpoint's topology files by others, with these ranges of the mask."""
    for file in folder.glob("topology-*"):
        file.unlink()
    entries = {}
    for rank, (start, end) in enumerate(ranges):
        entries |= write_mask(folder, rank, flags, start, end)

    def edit(manifest):
        kept = {k: v for k, v in manifest["files"].items() if not k.startswith("topology-")}
        manifest["files"] = kept | entries
        manifest["layers"]["a.weight"] |= {"grid": [1, len(flags)], "active": int(flags.sum())}

    edited(folder, edit)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 100), st.integers(0, 2**32))
def test_masks_survive_any_cut(tmp_path_factory, data, size, seed):
    """Cuts anywhere, parts in any order of ranks, empty ones too: any range reads back."""
    folder = tmp_path_factory.mktemp("cuts") / files.step_folder(5)
    write_checkpoint(folder, ranks=1)
    flags = torch.from_numpy(np.random.default_rng(seed).random(size) < 0.5)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=5)))
    ranges = list(zip([0, *cuts], [*cuts, size], strict=True))
    recut(folder, flags, data.draw(st.permutations(ranges)))
    reader = files.open_checkpoint(folder)
    assert torch.equal(reader.pattern("a.weight").active.view(-1), flags)
    for _ in range(5):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        assert torch.equal(reader.mask("a.weight", start, stop - start), flags[start:stop])


@pytest.mark.parametrize(
    "ranges",
    [[(0, 9), (10, 35)], [(1, 35)], [(0, 34)], []],
    ids=["gap", "start", "end", "nothing"],
)
def test_masks_with_a_gap_are_refused(folder, ranges):
    flags = torch.ones(35, dtype=torch.bool)
    recut(folder, flags, ranges)
    reader = files.open_checkpoint(folder)
    for read in (reader.patterns, lambda: reader.mask("a.weight", 0, 35)):
        with pytest.raises(UserError, match=r"topology of a\.weight is incomplete"):
            read()


def test_mask_bits_that_do_not_fit_their_range_are_refused(folder):
    name = "topology-00001.safetensors"
    for bits in (np.zeros(1, dtype=np.uint8), np.zeros(2, dtype=np.int8)):
        ranges = {"a.weight": (11, 12)}
        entry = files.write_tensors(folder / name, {"a.weight": bits}, ranges)
        edited(folder, lambda manifest, entry=entry: manifest["files"].update({name: entry}))
        with pytest.raises(UserError, match=r"topology-0000\d.*a\.weight is [UI]8 of"):
            files.open_checkpoint(folder).mask("a.weight", 0, 35)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_everything_reads_back_exactly(tmp_path, ranks):
    tensors, pattern = write_checkpoint(tmp_path / "step-00000005", ranks=ranks)
    reader = files.open_checkpoint(tmp_path)
    for (kind, name), value in tensors.items():
        assert torch.equal(reader.parameter(name, kind), torch.from_numpy(value))
        flat = value.reshape(-1)
        for start, end in itertools.combinations(range(0, flat.size + 1, 3), 2):
            got = reader.fragment(name, kind, start, end - start)
            assert torch.equal(got, torch.from_numpy(flat[start:end]))
    read = reader.patterns()
    assert list(read) == list(reader.layers) == ["a.weight"]
    assert torch.equal(read["a.weight"].active, pattern.active)
    active = int(pattern.active.sum())
    assert reader.layers["a.weight"] == SavedLayer((7, 5), (1, 1), active)
    assert reader.rng(ranks - 1)["cpu"].tolist() == list(range(ranks - 1, ranks + 15))
    assert reader.gpt_config.d_model == 4


def test_a_fragment_outside_the_parameter_is_refused(folder):
    reader = files.open_checkpoint(folder)
    with pytest.raises(UserError, match="lacks elements"):
        reader.fragment("a.bias", "master", 5, 3)


def test_open_finds_the_newest_published(tmp_path):
    run = tmp_path / "run"
    for step in (3, 12):
        write_checkpoint(run / "checkpoints" / files.step_folder(step), step=step)
    (run / "checkpoints/step-00000099.tmp").mkdir()
    (run / "checkpoints/step-x").mkdir()
    for path in (run, run / "checkpoints", run / "checkpoints/step-00000012"):
        assert files.open_checkpoint(path).manifest["step"] == 12
    assert files.open_checkpoint(run / "checkpoints/step-00000003").manifest["step"] == 3
    assert files.list_steps(run / "checkpoints") == [3, 12]
    assert files.list_steps(run / "nothing") == []
    with pytest.raises(UserError, match=r"no checkpoint at .*nothing: no manifest\.json there"):
        files.open_checkpoint(run / "nothing")


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_flipped_bit_in_any_file_is_refused_by_name(folder):
    files.open_checkpoint(folder)
    generator = np.random.default_rng(1)
    for name in names_in(folder):
        path, good = folder / name, (folder / name).read_bytes()
        for position in generator.integers(0, len(good) * 8, 12).tolist():
            bad = bytearray(good)
            bad[position // 8] ^= 1 << position % 8
            path.write_bytes(bad)
            with pytest.raises(UserError) as caught:
                files.open_checkpoint(folder)
            assert name in str(caught.value) or name == "manifest.json", (name, position)
            assert str(folder) in str(caught.value)
        path.write_bytes(good)
    files.open_checkpoint(folder)


def test_any_bit_of_the_manifest_counts(folder):
    """Each flip is refused, or is none: 1e-05 as 1E-05. A stride over all bytes, all their bits."""
    path, good = folder / "manifest.json", (folder / "manifest.json").read_bytes()
    manifest, harmless = read_manifest(folder), 0
    for position in range(0, len(good), 23):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            try:
                assert read_manifest(folder) == manifest
                harmless += 1
            except UserError as error:
                assert "step-00000005" in str(error)  # noqa: PT017 - either is right
    assert harmless <= 1


def test_truncated_longer_and_missing_files(folder):
    for name in names_in(folder):
        path, good = folder / name, (folder / name).read_bytes()
        for bad in (good[:-1], good[: len(good) // 2], b"", good + b"\0"):
            path.write_bytes(bad)
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                files.open_checkpoint(folder)
        path.unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            files.open_checkpoint(folder)
        path.write_bytes(good)


def test_files_of_another_run_or_rank_are_refused(folder, tmp_path):
    other = tmp_path / "other" / files.step_folder(5)
    write_checkpoint(other, seed=1)
    for name in names_in(folder):
        if name.startswith("rng") or name == "manifest.json":
            continue  # the same in both
        kept = (folder / name).read_bytes()
        shutil.copyfile(other / name, folder / name)
        with pytest.raises(UserError, match=rf"sha256 of {name.replace('.', '[.]')} is wrong"):
            files.open_checkpoint(folder)
        (folder / name).write_bytes(kept)
    first, second = folder / "master-00000.safetensors", folder / "exp_avg-00000.safetensors"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(UserError, match=r"(master|exp_avg)-00000\.safetensors"):
        files.open_checkpoint(folder)
    first.write_bytes(a)
    second.write_bytes(b)
    shutil.copyfile(other / "manifest.json", folder / "manifest.json")
    with pytest.raises(UserError, match=r"-0000\d\.safetensors"):
        files.open_checkpoint(folder)


def edited(folder, edit):
    """Rewrite the manifest, digest included, with `edit` applied to it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    "name",
    ["../../secret", "/etc/passwd", "a/b.safetensors", "..", ".", "", "./master-00000.safetensors"],
)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    (folder.parent.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": "0" * 64}
    edited(folder, lambda manifest: manifest["files"].update({name: entry}))
    with pytest.raises(UserError, match="broken checkpoint"):
        files.open_checkpoint(folder)


JUNK = {
    "format": 99,
    "step": -1,
    "state": [],
    "gpt_config": 3,
    "parameters": {"a": "7x5"},
    "layers": {"a": {"grid": [1], "block": [1, 1], "active": 1}},
    "topology_digest": None,
    "files": {"x": {"size": "1", "sha256": "0"}},
    "config": None,
    "world_size": "two",
    "optimizer_steps": 1.5,
    "unknown": 1,
}


@pytest.mark.parametrize("key", JUNK)
def test_junk_in_the_manifest_is_refused(folder, key):
    edited(folder, lambda manifest: manifest.update({key: JUNK[key]}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        files.open_checkpoint(folder)


@pytest.mark.parametrize("key", [k for k in JUNK if k not in ("unknown", "world_size",
                                                              "optimizer_steps")])  # fmt: skip
def test_a_manifest_that_lacks_a_key_is_refused(folder, key):
    edited(folder, lambda manifest: manifest.pop(key))
    with pytest.raises(UserError, match=r"manifest\.json"):
        files.open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, '{"format": 1}',
                                  "\xff\xfe", '{"format": {}}'])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        files.open_checkpoint(folder)


def test_a_checkpoint_of_format_1_is_refused_as_such(folder):
    """Its masks were cut and summed up otherwise: not damaged, but of another version."""

    def older(manifest):
        manifest["format"] = 1
        manifest["topology_sha256"] = manifest.pop("topology_digest")

    edited(folder, older)
    for read in (read_manifest, files.open_checkpoint):
        with pytest.raises(UserError) as caught:
            read(folder)
        assert str(caught.value).endswith("manifest.json: format 1, this version reads 3")
        assert str(folder) in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest_are_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("junk")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        files.open_checkpoint(folder)


def test_masks_that_do_not_cover_their_layer_are_refused(folder):
    def less(manifest):
        manifest["layers"]["a.weight"]["grid"] = [7, 6]

    edited(folder, less)
    with pytest.raises(UserError, match=r"topology of a\.weight is incomplete"):
        files.open_checkpoint(folder).patterns()


def test_a_count_that_is_not_the_masks_is_refused(folder):
    def more(manifest):
        manifest["layers"]["a.weight"]["active"] += 1

    edited(folder, more)
    with pytest.raises(UserError, match=r"topology of a\.weight is incomplete"):
        files.open_checkpoint(folder).patterns()


def test_no_file_is_a_pickle(folder):
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
