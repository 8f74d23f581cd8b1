"""Which weights were ever active: the union of all masks of a run, across resumes and layouts."""

import json

import pytest
import torch

from sparse_gpt.train.checkpoint_files import open_checkpoint, step_folder
from sparse_gpt.train.manifest import write_manifest
from tests.contracts.runs import after_every_step, masks, run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 30, 4))


def train(corpus, out, changes):
    """The union of the masks before the first step and after every step of one session."""
    seen = []
    with trainer(run_config(corpus, out, **changes)) as made:
        after_every_step(made, lambda step, health, update: seen.append(masks(made)))
        first = masks(made) if changes.get("stop_at") else None
        made.fit()
    seen += [first] if first is not None else []
    return {name: torch.stack([m[name] for m in seen]).any(0) for name in seen[0]}


BLOCKS = {"sparsity__structure": {"type": "block", "block": [4, 8]}}


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"deepspeed__zero_stage": 2}, (2, 1)),
        ({"deepspeed__zero_stage": 2, **BLOCKS, "sparsity__storage": "compact"}, (1, 2)),
    ],
    ids=["weights", "compact blocks"],
)
def test_the_union_of_all_masks_is_kept(corpus, tmp_path, changes, ranks):
    out = str(tmp_path / "run")
    one = run_ranks(ranks[0], train, corpus, out, changes | {"stop_at": 5})[0]
    two = run_ranks(ranks[1], train, corpus, out, changes)[0]
    reader = open_checkpoint(out)
    for name, layer in reader.layers.items():
        ever = (one[name] | two[name]).view(-1)
        assert torch.equal(reader.ever_active(name, 0, ever.numel()), ever), name
        assert layer.ever_active == int(ever.sum()) > layer.active
        block = layer.block[0] * layer.block[1]
        assert layer.never_active_weights == (ever.numel() - int(ever.sum())) * block > 0


def forget(folder):
    """Make a checkpoint one that does not say what was ever active."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["layers"].values():
        entry["ever_active"] = None
    write_manifest(folder, manifest)


def test_a_checkpoint_that_does_not_say(corpus, tmp_path):
    out = str(tmp_path / "run")
    run_ranks(1, train, corpus, out, {"stop_at": 2})
    layers = open_checkpoint(out).layers.values()
    assert all(layer.ever_active == layer.active for layer in layers)  # nothing moved yet
    assert not list(tmp_path.glob("run/checkpoints/*/ever-*"))
    forget(tmp_path / "run/checkpoints" / step_folder(2))
    run_ranks(1, train, corpus, out, {})
    layers = open_checkpoint(out).layers.values()
    assert {layer.never_active_weights for layer in layers} == {None}
