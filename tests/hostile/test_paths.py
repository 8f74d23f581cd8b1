"""Names in indexes and manifests lead to files beside them, and nowhere else."""

import json
import os
from pathlib import Path

import pytest

from sparse_gpt.data.megatron import open_megatron
from sparse_gpt.data.shards import open_data
from sparse_gpt.experiment import results
from sparse_gpt.experiment.record import Records
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.hf.stock import stock_model
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.data.fixtures import make_folder
from tests.experiment import synthetic
from tests.hf.checkpoints import sparse_model, write_run
from tests.hostile.folders import edit_json, gpt2_folder, resign

ELSEWHERE = {
    "up": "../../secret",
    "absolute": "/etc/passwd",
    "folder": "a/b",
    "parent": "..",
    "here": ".",
    "empty": "",
    "nul": "a\0b",
    "hidden slash": "tokenizer/../../secret",
    "surrogate": "\ud800",
    "newline": "a\nb",
    "long": "x" * 5000,
}
names = pytest.mark.parametrize("name", ELSEWHERE.values(), ids=ELSEWHERE)


@names
@pytest.mark.parametrize("key", ["file", "documents_file"])
def test_prepared_data(tmp_path, refused, name, key) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 8)
    folder = make_folder(tmp_path / "a" / "data", {"train": [[1, 2, 3]]})

    def change(index):
        entry = index["splits"]["train"]
        (entry if key in entry else entry["shards"][0])[key] = name

    edit_json(folder / "index.json", change)
    with refused(folder / "index.json"):
        open_data(folder)


def test_a_file_that_is_two_parts(tmp_path, refused) -> None:
    folder = make_folder(tmp_path / "data", {"train": [[1, 2, 3]], "val": [[1, 2, 3]]})

    def change(index):
        index["splits"]["val"]["shards"][0]["file"] = "train-00000.bin"

    edit_json(folder / "index.json", change)
    with refused(folder / "index.json", "train-00000.bin is named twice"):
        open_data(folder)


@pytest.mark.parametrize("name", ["train-00000.bin", "train.doc.npy", "index.json"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe", "folder"])
def test_prepared_data_that_is_no_file(tmp_path, refused, name, kind) -> None:
    folder = make_folder(tmp_path / "data", {"train": [[1, 2, 3]]})
    _replace(folder / name, kind, tmp_path)
    if (name, kind) == ("index.json", "link"):
        assert open_data(folder).splits  # it names files of this folder, wherever it lies
        return
    with refused(folder, name):
        open_data(folder)


def _replace(path: Path, kind: str, outside: Path) -> None:
    if kind == "link":
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
        return
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@names
def test_checkpoints(tmp_path, refused, name) -> None:
    folder = write_run(tmp_path / "run", sparse_model())
    (folder.parent.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": "0" * 64}
    resign(folder, lambda manifest: manifest["files"].update({name: entry}))
    with refused("broken checkpoint", folder):
        open_checkpoint(folder)


@names
def test_the_chosen_learning_rate(tmp_path, refused, name) -> None:
    write_run(tmp_path / "run", sparse_model())
    write_run(tmp_path / "run/a/b", sparse_model())
    (tmp_path / "run/lr-0.1").mkdir()
    results = tmp_path / "run/results.json"
    results.write_text(json.dumps({"run": name}))
    with refused(results, "is no folder of a learning rate"):
        open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["master-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "device", "pipe", "folder"])
def test_checkpoints_that_are_no_files(tmp_path, refused, name, kind) -> None:
    folder = write_run(tmp_path / "run", sparse_model())
    _replace(folder / name, kind, tmp_path)
    if (name, kind) == ("manifest.json", "link"):
        assert open_checkpoint(folder).names
        return
    with refused(folder, name):
        open_checkpoint(folder)


@names
def test_weights_of_a_hugging_face_folder(tmp_path, refused, name) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = gpt2_folder(tmp_path / "a" / "hf")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    for read in (ImportedWeights, stock_model):
        with refused(folder):
            read(folder)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_hugging_face_files_that_are_none(tmp_path, refused, kind, name) -> None:
    folder = gpt2_folder(tmp_path / "hf")
    _replace(folder / name, kind, tmp_path)
    for read in (ImportedWeights, stock_model):
        with refused(folder, name):
            read(folder)


@pytest.mark.parametrize("prefix", ["../x/corpus", "/etc/passwd", "a\0b", "", ".", "x" * 5000])
def test_megatron_prefixes(tmp_path, refused, prefix) -> None:
    """A prefix is a path of the user's own; one without a pair is named."""
    with refused("data path"):
        open_data(tmp_path / prefix if "passwd" not in prefix else Path(prefix))


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_megatron_devices(tmp_path, refused, end) -> None:
    for each in (".bin", ".idx"):
        (tmp_path / f"c{each}").write_bytes(b"MMIDIDX\0\0" + bytes(25))
    (tmp_path / f"c{end}").unlink()
    (tmp_path / f"c{end}").symlink_to("/dev/zero")
    with refused(tmp_path / "c"):
        open_data(tmp_path / "c")
    with refused(tmp_path):
        open_megatron(tmp_path / "c")


@pytest.mark.parametrize("run", ["../../x", "..", "/etc/passwd", "a/b", "", "a\0b", "x" * 300])
def test_records(tmp_path, refused, run) -> None:
    good = synthetic.record("dense", 1, 4.0)
    folder = synthetic.write(tmp_path / "r", [good])
    path = folder / "runs" / "bad.json"
    path.write_text(json.dumps({**good, "run": run, "seed": 2}))
    read = results.read(folder)
    assert [record.run for record in read.records] == ["dense-s1"]
    assert len(read.refused) == 1 and read.refused[0].startswith("bad.json: ")
    if not all(c.isalnum() or c in ".-" for c in run) or len(run) > 200:
        with refused(path):
            Records(folder).read("bad")


@pytest.mark.parametrize("kind", ["link", "device", "pipe", "folder"])
def test_records_that_are_no_files(tmp_path, refused, kind) -> None:
    folder = synthetic.write(tmp_path / "r", [synthetic.record("dense", s, 4.0) for s in (1, 2)])
    path = folder / "runs" / "dense-s2.json"
    _replace(path, kind, tmp_path)
    assert results.read(folder).refused == ["dense-s2.json: not a regular file"]
    if kind != "link":
        with refused(path):
            Records(folder).read("dense-s2")
