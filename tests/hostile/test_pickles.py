"""A pickle in the place of any file that is read makes nothing, and its file is named."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.answers import Answers
from eval.model_folder import open_folders
from sparse_gpt.data import corpus
from sparse_gpt.data.shards import open_data
from sparse_gpt.data.text_files import read_texts
from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.errors import UserError
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.hf.stock import stock_model
from sparse_gpt.train.checkpoint_files import CheckpointReader, open_checkpoint
from tests.data.fixtures import make_folder
from tests.hf.checkpoints import sparse_model, write_run
from tests.hostile import evil
from tests.hostile.folders import gpt2_folder, resign

dresses = pytest.mark.parametrize("dress", evil.DRESSES.values(), ids=evil.DRESSES)


def test_the_pickles_are_live(tmp_path: Path) -> None:
    """Else the tests below could not fail."""
    for number, make in enumerate((evil.plain, evil.torch_old)):
        path = tmp_path / str(number)
        content = make(path)
        command = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
        if make is evil.torch_old:
            load = "import io, sys, torch; torch.load(io.BytesIO(sys.stdin.buffer.read()), "
            command[-1] = load + "weights_only=False)"
        subprocess.run(command, input=content, check=True, timeout=300)
        assert path.is_dir()
    other = tmp_path / "other"
    np.load(_written(tmp_path / "x.npy", evil.npy(other)), allow_pickle=True)
    assert other.is_dir()
    assert pickle.PROTO in evil.torch_zip(other)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@dresses
@pytest.mark.parametrize("kind", ["master", "topology"])
def test_checkpoint_tensors(tmp_path, marker, refused, dress, kind) -> None:
    """Also where the manifest vouches for it."""
    folder = write_run(tmp_path / "run", sparse_model())
    file = folder / f"{kind}-00000.safetensors"
    file.write_bytes(dress(marker))
    with refused(f"{kind}-00000.safetensors"):
        open_checkpoint(folder)
    resign(folder)
    with refused(f"{kind}-00000.safetensors"):
        reader = open_checkpoint(folder)
        reader.patterns()
        reader.parameter("h.0.attn.q.weight")


@dresses
@pytest.mark.parametrize("kind", ["rng", "young", "slots", "ever", "trained"])
def test_checkpoint_files_for_resuming(tmp_path, marker, refused, dress, kind) -> None:
    folder = write_run(tmp_path / "run", sparse_model())
    file = f"{kind}-00000.safetensors"
    (folder / file).write_bytes(dress(marker))
    resign(folder)
    reader = CheckpointReader(folder)
    read = {
        "rng": lambda: reader.rng(0),
        "young": reader.young,
        "slots": lambda: reader.slots("h.0.attn.q.weight"),
        "ever": lambda: reader._flags("ever", "h.0.attn.q.weight", 0, 32),
        "trained": lambda: reader.mask("h.0.attn.q.weight", 0, 32, trained=True),
    }
    with refused(folder, file):
        read[kind]()


@dresses
def test_manifest(tmp_path, marker, refused, dress) -> None:
    folder = write_run(tmp_path / "run", sparse_model())
    (folder / "manifest.json").write_bytes(dress(marker))
    with refused(folder / "manifest.json"):
        open_checkpoint(folder)


@dresses
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_model_folders(tmp_path, marker, refused, dress, name) -> None:
    folder = gpt2_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(dress(marker))
    with refused(folder / name, "pickle"):
        ImportedWeights(folder)
    with refused(name, "is a pickle and is not loaded"):
        open_folders([str(folder)])
    with refused(folder, "model.safetensors"):
        stock_model(folder)


@dresses
def test_weights_under_the_name_of_safetensors(tmp_path, marker, refused, dress) -> None:
    folder = gpt2_folder(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(dress(marker))
    for read in (ImportedWeights, stock_model):
        with refused(folder / "model.safetensors", "not a safetensors file"):
            read(folder)


def test_an_index_that_names_a_pickle(tmp_path, marker, refused) -> None:
    """`transformers` would read it with torch."""
    folder = gpt2_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "weights.bin").write_bytes(evil.torch_zip(marker))
    index = folder / "model.safetensors.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"transformer.wte.weight": "weights.bin"}}')
    with refused(index, "'weights.bin'"):
        stock_model(folder)
    with refused(folder / "weights.bin", "not a safetensors file"):
        ImportedWeights(folder)


@dresses
def test_boundaries_and_index_of_prepared_data(tmp_path, marker, refused, dress) -> None:
    folder = make_folder(tmp_path / "data", {"train": [[1, 2, 3]]})
    (folder / "train.doc.npy").write_bytes(dress(marker))
    with refused(folder / "train.doc.npy"):
        open_data(folder)
    (folder / "index.json").write_bytes(dress(marker))
    with refused(folder / "index.json"):
        open_data(folder)


@dresses
def test_answers_of_the_leaderboard(tmp_path, marker, dress, capsys) -> None:
    """They only save time, so a broken file is named and they are made anew."""
    path = tmp_path / "task.answers.npz"
    path.write_bytes(dress(marker))
    assert not Answers(3, "0" * 64, path).done.any()
    names = ("requests_sha256", "done", "loglikelihood", "greedy")
    path.write_bytes(evil.npz(marker, *names))
    assert not Answers(3, "0" * 64, path).done.any()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith(f"{path} is broken (") for line in said)


@dresses
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_tokenizers(tmp_path, marker, refused, dress, name) -> None:
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).write_bytes(dress(marker))
    with refused(tmp_path / name):
        load_tokenizer(tmp_path)


@dresses
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt.zst"])
def test_corpora(tmp_path, marker, refused, dress, name) -> None:
    path = _written(tmp_path / name, dress(marker))
    with refused(path):
        list(read_texts(path, text_field="text", encoding="utf-8", lines=False, limit=10**6))


@pytest.mark.parametrize("name", ["data.pkl", "train.pickle", "deep/er/train.pth", "x.pt"])
def test_data_sets_of_pickles(tmp_path, marker, refused, name) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(evil.plain(marker))
    with refused(f"--dataset {tmp_path / 'set'} holds a pickle ({name})"):
        corpus.dataset_splits(str(tmp_path / "set"), None)


def test_a_pickled_data_file_in_an_archive(tmp_path, marker) -> None:
    """A folder of .tar is a data set of the kind webdataset, whose members may be pickles."""
    inside = tmp_path / "sample.pyd"
    inside.write_bytes(evil.plain(marker))
    folder = tmp_path / "set"
    folder.mkdir()
    import tarfile

    with tarfile.open(folder / "train.tar", "w") as archive:
        for end in ("pyd", "pickle", "pth", "npy"):
            archive.add(inside, f"sample.{end}")
    with pytest.raises(UserError, match="--dataset"):
        list(corpus.iter_documents(corpus.dataset(str(folder), split="train")))
    shutil.rmtree(folder)
