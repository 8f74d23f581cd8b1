"""Topology files whose digests are right and whose content is not: every rank says so and ends."""

import hashlib
import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sparse_gpt.errors import UserError
from sparse_gpt.train.manifest import digest_of
from tests.contracts.runs import run_config, trainer
from tests.ranks import run_ranks


def train(corpus, out, steps):
    config = run_config(corpus, out, stop_at=steps, sparsity__update={"freq": 100})
    with trainer(config) as made:
        made.fit()


def refuse(corpus, out):
    with pytest.raises(UserError) as caught:
        train(corpus, out, 4)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lying") / "run"
    run_ranks(2, train, corpus, str(folder), 2)
    return folder


def lie(folder, kind):
    """Change rank 1's share of a mask, and make every digest fit."""
    checkpoint = next(folder.rglob("step-00000002"))
    file = checkpoint / "topology-00001.safetensors"
    with safe_open(file, "numpy") as handle:
        tensors = {key: handle.get_tensor(key).copy() for key in handle.keys()}  # noqa: SIM118
        ranges = json.loads(handle.metadata()["ranges"])
    name = sorted(tensors)[0]
    if kind == "flipped":
        tensors[name][0] ^= 1
    elif kind == "cut":
        ranges[name][1] -= 8
        tensors[name] = tensors[name][:-1]
    else:
        del tensors[name]
    save_file(tensors, file, metadata={"ranges": json.dumps(ranges)})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256}
    manifest["sha256"] = digest_of(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["flipped", "cut", "gone"])
def test_every_rank_refuses_it(corpus, run, tmp_path, kind):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    lie(folder, kind)
    said = run_ranks(2, refuse, corpus, str(folder), timeout_seconds=60)
    for message in said:
        assert "broken checkpoint" in message
        assert ".weight" in message or "topology" in message
