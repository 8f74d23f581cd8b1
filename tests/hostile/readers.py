"""What the fuzzer reads: a valid file each, ways to spoil it, the reader, and its promises."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import dump_yaml, load_config, validate
from sparse_gpt.data.shards import TokenData, open_data
from sparse_gpt.errors import UserError
from sparse_gpt.experiment import results
from sparse_gpt.experiment.record import Records
from sparse_gpt.hf import import_folder
from sparse_gpt.train.checkpoint_files import CheckpointReader, open_checkpoint
from tests.data.fixtures import make_folder, random_documents
from tests.experiment import synthetic
from tests.hf.checkpoints import sparse_model, write_run
from tests.hostile.folders import gpt2_folder, put, signed
from tests.hostile.mutations import spoilt_bytes, spoilt_tree, text_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ("debug", "demo", "pretrain/gpt3_125m_sparsewide75_rigl", "pretrain/novels_dense")


class Config:
    """A run's configuration, as it is written by hand and as it is saved resolved."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.yaml"
        self.named = str(self.path)
        files = [ROOT / "configs" / f"{name}.yaml" for name in CONFIGS]
        self.texts = [path.read_bytes() for path in files]
        self.trees = [yaml.safe_load(text) for text in self.texts]
        resolved = dump_yaml(load_config(files[0])).encode()
        self.trees.append(yaml.safe_load(resolved))

    def spoil(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            put(self.path, spoilt_bytes(rng, rng.choice(self.texts)))
        else:
            put(self.path, text_of(rng, spoilt_tree(rng, rng.choice(self.trees))))

    def read(self) -> RunConfig:
        return load_config(self.path)

    def check(self, config: RunConfig) -> None:
        assert type(config) is RunConfig
        tree = json.loads(config.model_dump_json())
        assert validate(RunConfig, tree, self.named) == config
        assert config.total_steps(1) >= 1 and config.batch(1) >= 1
        assert 1 <= config.dims["n_layer"] <= 1000 and config.dims["d_model"] >= 1
        assert 0 <= config.sparsity.sparsity < 1 and config.optimizer.lr > 0


class Index:
    """The index of prepared data; now and then its boundaries or tokens."""

    def __init__(self, folder: Path) -> None:
        splits = {"train": random_documents(1, 30), "val": random_documents(2, 5)}
        self.folder = make_folder(folder / "data", splits, shard_tokens=300)
        self.named = str(self.folder)
        names = ("index.json", "train.doc.npy", "train-00001.bin")
        self.valid = {name: (self.folder / name).read_bytes() for name in names}
        self.tree = json.loads(self.valid["index.json"])
        self.spoilt = "index.json"

    def spoil(self, rng: random.Random) -> None:
        put(self.folder / self.spoilt, self.valid[self.spoilt])
        draw = rng.random()
        self.spoilt = "index.json"
        if draw < 0.6:
            content = text_of(rng, spoilt_tree(rng, self.tree))
        else:
            self.spoilt = "index.json" if draw < 0.85 else rng.choice(list(self.valid))
            content = spoilt_bytes(rng, self.valid[self.spoilt])
        put(self.folder / self.spoilt, content)

    def read(self) -> TokenData:
        return open_data(self.folder)

    def check(self, data: TokenData) -> None:
        assert 0 <= data.eos_id < data.vocab_size <= 2**30
        files = {path.name for path in self.folder.iterdir()}
        for split in data.splits.values():
            assert 0 <= split.n_tokens <= 20_000 and split.n_documents <= split.n_tokens
            if split.n_tokens:
                assert split.read(split.n_tokens - 1, 1)[0] < data.vocab_size
                split.read(0, split.n_tokens)
                assert split.document_ids(0, split.n_tokens)[-1] == split.n_documents - 1
        assert {"index.json", "tokenizer"} <= files


class Manifest:
    """The manifest of a checkpoint, mostly with a digest that is right."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_run(folder / "run", sparse_model())
        self.named = str(self.folder)
        self.path = self.folder / "manifest.json"
        self.valid = self.path.read_bytes()
        self.tree = json.loads(self.valid)
        del self.tree["sha256"]

    def spoil(self, rng: random.Random) -> None:
        if rng.random() < 0.25:
            put(self.path, spoilt_bytes(rng, self.valid))
            return
        tree = spoilt_tree(rng, self.tree)
        put(self.path, text_of(rng, tree))
        if isinstance(tree, dict):
            from sparse_gpt.train.manifest import digest_of

            text = text_of(rng, {**tree, "sha256": digest_of(tree)})
            put(self.path, text)

    def read(self) -> CheckpointReader:
        return read_whole(self.folder)

    def check(self, reader: CheckpointReader) -> None:
        assert reader.gpt_config.n_layer == 2 and len(reader.layers) <= 12
        assert set(reader.layers) <= set(reader.names)


def read_whole(folder: Path) -> CheckpointReader:
    """A checkpoint with all that is in it, as an export reads it."""
    reader = open_checkpoint(folder)
    reader.check_model()
    patterns = reader.patterns()
    for name in reader.names:
        tensor = reader.parameter(name)
        assert tuple(tensor.shape) == reader.dense_shape(name)
        if name in patterns:
            assert int(patterns[name].active.sum()) == reader.layers[name].active
    return reader


def spoilt_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The length of the header, the header's tree, its bytes, or any byte of the file."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return spoilt_bytes(rng, content)
    if kind < 0.3:
        claimed = rng.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
        return claimed.to_bytes(8, "little") + header + data
    if kind < 0.5:
        header = spoilt_bytes(rng, header)
    else:
        tree = json.loads(header)
        ranges = tree.get("__metadata__", {}).get("ranges")
        if ranges is not None and rng.random() < 0.5:
            spoilt = text_of(rng, spoilt_tree(rng, json.loads(ranges)))
            tree["__metadata__"]["ranges"] = spoilt.decode("utf-8", "replace")
        else:
            tree = spoilt_tree(rng, tree)
        header = text_of(rng, tree)
    return len(header).to_bytes(8, "little") + header + data


class Shard:
    """A tensor file of a checkpoint whose manifest vouches for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = write_run(folder / "run", sparse_model())
        self.named = str(self.folder)
        files = sorted(self.folder.glob("*.safetensors"))
        self.valid = {path: path.read_bytes() for path in files}
        self.spoilt = files[0]

    def spoil(self, rng: random.Random) -> None:
        put(self.spoilt, self.valid[self.spoilt])
        self.spoilt = rng.choice(list(self.valid))
        put(self.spoilt, spoilt_safetensors(rng, self.valid[self.spoilt]))
        put(self.folder / "manifest.json", json.dumps(signed(self.folder)).encode())

    def read(self) -> CheckpointReader:
        return read_whole(self.folder)

    def check(self, reader: CheckpointReader) -> None:
        assert len(reader.layers) == 12


class Folder:
    """The weights of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = gpt2_folder(folder / "hf")
        self.named = str(self.folder)
        self.path = self.folder / "model.safetensors"
        self.valid = self.path.read_bytes()
        self.shapes = {name: t.shape for name, t in load_file(self.path).items()}

    def spoil(self, rng: random.Random) -> None:
        put(self.path, spoilt_safetensors(rng, self.valid))

    def read(self) -> Any:
        return import_folder(self.folder)

    def check(self, read: Any) -> None:
        config, tensors = read
        assert config.n_layer == 1
        assert tensors["wte.weight"].shape == self.shapes["transformer.wte.weight"]


class Record:
    """A record of an experiment, read by the page and by the runner."""

    def __init__(self, folder: Path) -> None:
        self.trees = [
            synthetic.record("set75", 2, 4.1, sparsity=0.75, algorithm="set"),
            synthetic.finetuned("set75", 2, "dense", 3.9, sparsity=0.75, grid={"1e-3": 3.9}),
            synthetic.leaderboard("set75", 2, 0.3, sparsity=0.75),
        ]
        self.folder = synthetic.write(folder / "r", [synthetic.record("dense", 1, 4.0)])
        self.named = str(self.folder)
        self.path = self.folder / "runs" / "set75-s2.json"

    def spoil(self, rng: random.Random) -> None:
        tree = dict(rng.choice(self.trees), run="set75-s2")
        if rng.random() < 0.3:
            put(self.path, spoilt_bytes(rng, json.dumps(tree).encode()))
        else:
            put(self.path, text_of(rng, spoilt_tree(rng, tree)))

    def read(self) -> Any:
        read = results.read(self.folder)
        assert len(read.records) + len(read.refused) == 2
        assert all(line.isprintable() and len(line) < 700 for line in read.refused)
        found = next((r for r in read.records if r.run == "set75-s2"), None)
        mine = Records(self.folder).read("set75-s2")
        if found is None:
            raise UserError(f"{self.named}: {read.refused}")
        return found, mine

    def check(self, read: Any) -> None:
        record, tree = read
        assert record.run == "set75-s2" and 0 <= record.seed <= 2**63
        assert record.stage in ("pretrain", "finetune", "leaderboard")
        assert tree["schema"] == 1 and isinstance(tree.get("config", {}), dict)
        for split in ("val", "test"):
            loss = record.final_loss(split)
            assert loss is None or loss - loss == 0


READERS = {
    "config": Config,
    "index": Index,
    "manifest": Manifest,
    "shard": Shard,
    "folder": Folder,
    "record": Record,
}
