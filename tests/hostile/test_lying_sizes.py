"""Files that claim more than they hold: refused before anything of the claimed size is made."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eval.answers import Answers
from sparse_gpt.data.shards import open_data
from sparse_gpt.errors import UserError
from sparse_gpt.hf import import_folder
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.hf.stock import stock_model
from sparse_gpt.train.checkpoint_files import CheckpointReader, open_checkpoint
from sparse_gpt.train.state import TrainState
from tests.data.fixtures import make_folder
from tests.hf.checkpoints import sparse_model, write_run
from tests.hostile.folders import edit_json, gpt2_folder, raw_safetensors, resign

HUGE = [2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, -(2**63), 1.5, 1e300, True, "9", None, []]


@pytest.fixture
def data(tmp_path):
    return make_folder(tmp_path / "data", {"train": [[1, 2, 3], [4]], "val": [[5]]})


@pytest.mark.parametrize("value", HUGE, ids=repr)
@pytest.mark.parametrize("key", ["tokens", "documents", "bytes", "words", "shard", "vocab_size",
                                 "eos_id", "version"])  # fmt: skip
def test_counts_of_an_index(data, refused, key, value):
    def change(index):
        entry = index["splits"]["train"]
        if key == "shard":
            entry["shards"][0]["tokens"] = value
            if isinstance(value, int):
                entry["tokens"] = value
        else:
            (index if key in index else entry)[key] = value

    edit_json(data / "index.json", change)
    if key in ("bytes", "words") and type(value) is int and 0 <= value < 2**63:
        assert open_data(data)  # records of the reader; nothing is made of them
        return
    with refused(data, mb=4):
        open_data(data)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u8', 'fortran_order': False, 'shape': (4611686018427387904,), }",
        "{'descr': '<u8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<u8', 'fortran_order': True, 'shape': (3,), }",
        "{'descr': '>u8', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': [('a', '<u8')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<u8', 'fortran_order': False, 'shape': (3, 99999999999), }",
        "{'descr': '<u8', 'fortran_order': False, 'shape': (" + "9" * 9000 + ",), }",
        "{'descr': " + "-" * 9000 + "1}",
        "(" * 9000,
        "__import__('os').mkdir('MARKER')",
        "",
    ],
    ids=lambda text: text[:60],
)
def test_headers_of_boundaries(data, refused, marker, header):
    """numpy reads them as literals of Python, and believes their shape."""
    text = header.replace("MARKER", str(marker)).encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)
    (data / "train.doc.npy").write_bytes(content)
    with refused(data / "train.doc.npy", mb=4):
        open_data(data)


@pytest.mark.parametrize("size", [0, 7, 8, 2**20])
def test_boundaries_of_another_size(data, refused, size):
    content = (data / "train.doc.npy").read_bytes()[:128]
    (data / "train.doc.npy").write_bytes(content + bytes(size))
    with refused(data / "train.doc.npy"):
        open_data(data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "longer than the file": ({"a": entry()}, b"", 2**40),
    "length 2^63": ({"a": entry()}, b"\0" * 8, 2**63),
    "length -1": ({"a": entry()}, b"\0" * 8, 2**64 - 1),
    "more data than there is": ({"a": entry(shape=(2**38,), offsets=(0, 2**40))}, b"\0" * 8, None),
    "less data": ({"a": entry(offsets=(0, 4))}, b"\0" * 8, None),
    "left over": ({"a": entry()}, b"\0" * 800, None),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, None),
    "twice the same": ({"a": entry(), "b": entry()}, b"\0" * 8, None),
    "a hole": ({"a": entry(), "b": entry(offsets=(16, 24))}, b"\0" * 24, None),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, None),
    "negative": ({"a": entry(offsets=(-8, 0))}, b"\0" * 8, None),
    "shape overflows": ({"a": entry(shape=(2**32, 2**32, 2))}, b"\0" * 8, None),
    "shape negative": ({"a": entry(shape=(-2,))}, b"\0" * 8, None),
    "dtype": ({"a": entry(dtype="F33")}, b"\0" * 8, None),
    "a list": ([1], b"", None),
    "deep": (b"[" * 100_000, b"", None),
    "no JSON": (b"\xff\xfe{}", b"", None),
    "nothing": (b"", b"", None),
    "twice the key": (
        json.dumps({"a": entry()})[:-1].encode() + b', "a": {"dtype": "U8", "shape": [8], '
        b'"data_offsets": [0, 8]}}',
        b"\0" * 8,
        None,
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors(tmp_path, refused, kind):
    header, content, length = HEADERS[kind]
    folder = write_run(tmp_path / "run", sparse_model())
    raw_safetensors(folder / "master-00000.safetensors", header, content, length)
    resign(folder)
    with refused(folder, mb=8):
        open_checkpoint(folder).parameter("wte.weight")
    model = gpt2_folder(tmp_path / "hf")
    raw_safetensors(model / "model.safetensors", header, content, length)
    for read in (import_folder, stock_model):
        with refused(model, mb=8):
            read(model)


RANGES = {
    "negative": {"h.0.ln_1.weight": [-8, 8]},
    "beyond": {"h.0.ln_1.weight": [2**62, 8]},
    "huge": {"h.0.ln_1.weight": [0, 2**61]},
    "more than stored": {"h.0.ln_1.weight": [0, 16]},
    "text": {"h.0.ln_1.weight": ["0", "8"]},
    "three": {"h.0.ln_1.weight": [0, 8, 8]},
    "number": {"h.0.ln_1.weight": 8},
    "list": [1, 2],
    "null": None,
    "of nothing": {"absent": [0, 8]},
    "none": {},
}


@pytest.mark.parametrize("kind", RANGES)
def test_ranges_of_fragments(tmp_path, refused, kind):
    folder = write_run(tmp_path / "run", sparse_model(), ranks=1)
    part = {"h.0.ln_1.weight": np.ones(8, dtype=np.float32)}
    metadata = {"ranges": json.dumps(RANGES[kind])}
    save_file(part, folder / "master-00000.safetensors", metadata=metadata)
    resign(folder)
    with refused("broken checkpoint", folder, mb=4):
        open_checkpoint(folder).parameter("h.0.ln_1.weight")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8])
def test_dtypes_of_fragments(tmp_path, refused, dtype):
    folder = write_run(tmp_path / "run", sparse_model(), ranks=1)
    part = {"h.0.ln_1.weight": np.ones(16, dtype=dtype)}
    metadata = {"ranges": json.dumps({"h.0.ln_1.weight": [0, 16]})}
    save_file(part, folder / "master-00000.safetensors", metadata=metadata)
    resign(folder)
    with refused("master-00000.safetensors", "h.0.ln_1.weight is"):
        open_checkpoint(folder).parameter("h.0.ln_1.weight")


LIES = {
    "layers": lambda m: m["gpt_config"].update(n_layer=10**9),
    "more layers": lambda m: m["gpt_config"].update(n_layer=500),
    "heads": lambda m: m["gpt_config"].update(n_head=0),
    "width": lambda m: m["gpt_config"].update(d_model=2**40, n_head=1),
    "vocabulary": lambda m: m["gpt_config"].update(vocab_size=10**12),
    "text": lambda m: m["gpt_config"].update(d_ff="40"),
    "endless": lambda m: m["gpt_config"].update(dropout=float("inf")),
    "branches": lambda m: m["gpt_config"].update(
        transform={"member": "parallel", "non_linearity": "relu", "sizes": {"h.0.attn.q": 10**9}}
    ),
    "no transform": lambda m: m["gpt_config"].update(transform=3),
    "shape": lambda m: m["parameters"].update({"wte.weight": [2**40, 2**40]}),
    "no shape": lambda m: m["parameters"].pop("wte.weight"),
    "one more": lambda m: m["parameters"].update({"more": [2**50]}),
    "grid": lambda m: m["layers"]["h.0.attn.q.weight"].update(grid=[2**31, 2**31]),
    "block": lambda m: m["layers"]["h.0.attn.q.weight"].update(block=[4, 3]),
    "active": lambda m: m["layers"]["h.0.attn.q.weight"].update(active=2**62),
    "compact": lambda m: m["layers"]["h.0.attn.q.weight"].update(storage="compact"),
    "a layer of nothing": lambda m: m["layers"].update(
        {"x": {"grid": [1, 1], "block": [1, 1], "active": 1}}
    ),
    "size": lambda m: m["files"]["master-00000.safetensors"].update(size=2**60),
}


@pytest.mark.parametrize("kind", LIES)
def test_manifests(tmp_path, refused, kind):
    folder = write_run(tmp_path / "run", sparse_model())
    resign(folder, LIES[kind])
    with refused(folder, mb=16):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["births", "outside", "negative", "dtype", "two", "none"])
def test_young_weights(tmp_path, refused, kind):
    folder = write_run(tmp_path / "run", sparse_model())
    positions, births = np.arange(3), np.arange(3)
    if kind == "births":
        births = np.arange(2)
    elif kind in ("outside", "negative"):
        positions = positions + (10**12 if kind == "outside" else -1)
    elif kind == "dtype":
        positions = positions.astype(np.float32)
    elif kind == "two":
        positions = births = np.ones((3, 2), dtype=np.int64)
    name = "absent" if kind == "none" else "h.0.attn.q.weight"
    young = {f"{name}.positions": positions, f"{name}.births": births}
    save_file(young, folder / "young-00000.safetensors")
    resign(folder)
    with refused("broken checkpoint", folder):
        CheckpointReader(folder).young()


@pytest.mark.parametrize("kind", ["dtype", "name", "missing"])
def test_states_of_generators(tmp_path, refused, kind):
    folder = write_run(tmp_path / "run", sparse_model())
    state = torch.get_rng_state().numpy()
    if kind != "missing":
        part = {"gpu" if kind == "name" else "cpu": state.astype(np.int64)}
        save_file(part, folder / "rng-00000.safetensors")
        resign(folder)
    with refused("broken checkpoint", folder, "rng-00000.safetensors"):
        CheckpointReader(folder).rng(0)


@pytest.mark.parametrize("value", [-1, 2**300, 1.5, "3", None, True, [], float("nan")])
@pytest.mark.parametrize("key", ["step", "samples", "rollbacks"])
def test_states_of_runs(tmp_path, refused, key, value):
    saved = {**vars(TrainState()), key: value}
    with refused(tmp_path, key):
        TrainState().restore(saved, tmp_path)


HF = {
    "n_layer": 10**9,
    "n_embd": 2**40,
    "vocab_size": 10**12,
    "n_positions": 2**29,
    "n_inner": 2**30,
}


@pytest.mark.parametrize("key", HF)
def test_configurations_of_hugging_face_folders(tmp_path, refused, key):
    folder = gpt2_folder(tmp_path / "hf")
    edit_json(folder / "config.json", lambda config: config.update({key: HF[key]}))
    with refused(folder, "config.json", mb=4):
        import_folder(folder)
    with refused(folder, mb=16):
        stock_model(folder)


def test_our_own_configuration(tmp_path, refused):
    folder = gpt2_folder(tmp_path / "hf")
    transform = {"member": "parallel", "non_linearity": "relu", "sizes": {"h.0.attn.q": 900}}
    own = {"model_type": "sparse_gpt", "activation": "gelu", "transform": transform}
    own |= {"n_layer": 1, "n_head": 2, "d_model": 8, "d_ff": 16, "vocab_size": 257}
    own |= {"n_positions": 8}
    (folder / "config.json").write_text(json.dumps(own))
    with refused(folder / "config.json", "900 branches, but there are", mb=8):
        import_folder(folder)


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4,)", "(-1,)", "()"])
def test_answers(tmp_path, capsys, shape):
    """An archive that claims terabytes for an array, as `numpy.load` would make it."""
    import zipfile

    path, sha = tmp_path / "task.answers.npz", "0" * 64
    Answers(3, sha, path).save(now=True)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["loglikelihood.npy"] = parts["loglikelihood.npy"].replace(b"(3,)", shape.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert not Answers(3, sha, path).done.any()
    assert f"{path} is broken (" in capsys.readouterr().err


def test_a_checkpoint_of_no_lies(tmp_path):
    """What the lies are told of is accepted."""
    folder = write_run(tmp_path / "run", sparse_model())
    resign(folder)
    reader = open_checkpoint(folder)
    reader.check_model()
    assert len(reader.patterns()) == 12
    with pytest.raises(UserError, match="no parameter absent"):
        reader.parameter("absent")
