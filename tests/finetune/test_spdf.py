"""Fine-tuning: where it starts, what it trains, which weights it reports and exports."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint
from tests.finetune.conftest import SPARSE
from tests.finetune.runs import export, pretrain, results_of, tune
from tests.ranks import run_ranks
from tests.tiny import document

# The learning rate rises until the model diverges: the validation loss first falls, then rises.
DIVERGING = ["max_steps=40", "evaluation.every=1", "evaluation.patience=3", "optimizer.lr=0.6",
             "optimizer.grad_clip=0", "schedule.warmup_steps=40"]  # fmt: skip


def tuned(corpus, out, checkpoint, *overrides):
    return run_ranks(1, tune, corpus, str(out), str(checkpoint), list(overrides))[0]


def validations(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "validation"}


@pytest.fixture(scope="module")
def dense(corpus, pretrained, tmp_path_factory):
    return tuned(corpus, tmp_path_factory.mktemp("dense") / "run", pretrained.run)


@pytest.fixture(scope="module")
def diverged(corpus, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("diverged") / "run"
    return run, tuned(corpus, run, pretrained.run, *DIVERGING)


def test_dense_starts_from_the_checkpoint_with_a_fresh_optimizer(pretrained, dense):
    reader = open_checkpoint(pretrained.run)
    before = dense["before"]
    assert before["loss"] == pytest.approx(pretrained.loss, abs=1e-6)
    assert before["weights"].keys() == reader.shapes.keys()
    for name, weight in before["weights"].items():
        assert torch.equal(weight, reader.parameter(name)), name
    assert any(reader.parameter(name, "exp_avg").any() for name in reader.shapes)
    assert before["moments"] == [0.0] * (2 * len(reader.shapes))
    assert before["optimizer_steps"] == 0


def test_dense_trains_the_weights_outside_the_masks(pretrained, dense):
    patterns = open_checkpoint(pretrained.run).patterns()
    outside = 0
    for name, pattern in patterns.items():
        assert not dense["before"]["weights"][name][~pattern.active].any(), name
        assert dense["weights"][name][~pattern.active].any(), name
        outside += int((~pattern.active).sum())
    assert dense["results"]["mode"] == "dense"
    assert dense["results"]["weights_outside_masks"] == outside > 0
    assert dense["results"]["weights_outside_masks_train"] is True
    layers = open_checkpoint(pretrained.run).layers.items()
    never = sum(int((~open_checkpoint(pretrained.run).ever_active(name, 0, layer.weights)).sum())
                for name, layer in layers)  # fmt: skip
    assert dense["results"]["weights_never_active"] == never
    assert 0 < never < outside


def test_sparse_keeps_the_masks(corpus, pretrained, tmp_path):
    sparse = tuned(corpus, tmp_path / "run", pretrained.run, "mode=sparse")
    assert sparse["before"]["loss"] == pytest.approx(pretrained.loss, abs=1e-6)
    assert not any(sparse["before"]["moments"])
    saved, now = open_checkpoint(pretrained.run), open_checkpoint(tmp_path / "run")
    patterns = saved.patterns()
    assert patterns and patterns.keys() == now.patterns().keys()
    for name, pattern in patterns.items():
        assert torch.equal(now.pattern(name).active, pattern.active), name
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert not now.parameter(name, kind)[~pattern.active].any(), (name, kind)
        inside = sparse["weights"][name][pattern.active]
        assert not torch.equal(inside, sparse["before"]["weights"][name][pattern.active]), name
    assert sparse["results"]["weights_outside_masks_train"] is False


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradual_keeps_masks_and_unfreezes_all(corpus, pretrained, tmp_path, ranks):
    """Two blocks, so four phases; stopped early by nothing, tested at its best."""
    changes = ["mode=gradual", "max_steps=null", "epochs=0.02", "schedule=null"]
    run = tmp_path / "run"
    args = (corpus, str(run), str(pretrained.run), changes)
    results = run_ranks(ranks, results_of, *args)[0]
    every = results["unfreezing"]["every"]
    assert results["unfreezing"] == {"every": every, "tied_embedding": "head"}
    assert results["steps"] == 4 * every and every > 1
    assert results["schedule"] == f"fresh linear, rewound every {every} steps"
    assert list(validations(run)) == [every, 2 * every, 3 * every, 4 * every]
    assert results["tested_step"] in validations(run)
    assert results["weights_outside_masks_train"] is False
    saved, now = open_checkpoint(pretrained.run), open_checkpoint(run)
    for name, pattern in saved.patterns().items():
        assert torch.equal(now.pattern(name).active, pattern.active), name
    assert not torch.equal(now.parameter("wpe.weight"), saved.parameter("wpe.weight"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in records if r["kind"] == "train"]
    assert rates == rates[:every] * 4 and rates[0] > rates[1]


STORAGES = ("masked", "compact")


@pytest.mark.parametrize("before", STORAGES)
@pytest.mark.parametrize("storage", STORAGES)
def test_sparse_keeps_blocks(corpus, tmp_path, before, storage):
    blocks = {
        "sparsity__structure": {"type": "block", "block": [4, 8]},
        "sparsity__storage": before,
        "max_steps": 3,
    }
    (loss,) = run_ranks(1, pretrain, corpus, str(tmp_path / "blocks"), SPARSE | blocks)
    more = ("mode=sparse", f"storage={storage}", "kernel=reference")
    outcome = tuned(corpus, tmp_path / "run", tmp_path / "blocks", *more)
    assert outcome["before"]["loss"] == pytest.approx(loss, abs=1e-6)
    given = open_checkpoint(tmp_path / "blocks").patterns()
    kept = open_checkpoint(tmp_path / "run").patterns()
    assert {name: pattern.block for name, pattern in kept.items()} == dict.fromkeys(given, (4, 8))
    for name, pattern in given.items():
        assert torch.equal(kept[name].active, pattern.active), name
    total = sum(pattern.shape[0] * pattern.shape[1] for pattern in given.values())
    assert outcome["results"]["sparse_layer_weights"] == total
    assert outcome["results"]["weights_outside_masks"] == total * 3 // 4


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_members_keep_their_form(corpus, tmp_path, mode, storage):
    changes = SPARSE | {"ift__member": "doped", "ift__keep_dense": ["h.0.*"], "max_steps": 3}
    changes["sparsity__storage"] = storage
    loss = run_ranks(1, pretrain, corpus, str(tmp_path / "doped"), changes)[0]
    outcome = tuned(corpus, tmp_path / "run", tmp_path / "doped", f"mode={mode}")
    assert outcome["before"]["loss"] == pytest.approx(loss, abs=1e-6)
    given, now = open_checkpoint(tmp_path / "doped"), open_checkpoint(tmp_path / "run")
    assert now.gpt_config.transform == given.gpt_config.transform is not None
    assert len(given.layers) == 6
    kept = {name: replace(layer, compact=False) for name, layer in given.layers.items()}
    assert now.layers == (kept if mode == "sparse" else {})


def test_epochs_are_passes_over_the_training_split(corpus, pretrained, tmp_path):
    tokens = sum(len(document(number).encode()) + 1 for number in range(60))
    epoch = math.ceil((tokens - 1) // 32 / 512)  # whole sequences, in batches of 512
    wanted = math.ceil(1.5 * epoch)
    overrides = ("max_steps=null", "epochs=1.5", "micro_batch_size=256", "global_batch_size=512")
    outcome = tuned(corpus, tmp_path / "run", pretrained.run, *overrides)
    assert outcome["results"]["steps"] == wanted > epoch > 1
    assert list(validations(tmp_path / "run")) == [epoch, wanted]


def test_data_without_a_validation_split(corpus, pretrained, tmp_path):
    """Refused while early stopping is asked for; without it, the last weights are tested."""
    copy = Path(shutil.copytree(corpus, tmp_path / "no_val"))
    index = json.loads((copy / "index.json").read_text())
    del index["splits"]["val"]
    (copy / "index.json").write_text(json.dumps(index))
    refused = tuned(str(copy), tmp_path / "run", pretrained.run)
    assert "no val split" in refused["error"] and "--val-fraction" in refused["error"]
    plain = ("evaluation.patience=null", "max_steps=2")
    results = tuned(str(copy), tmp_path / "run", pretrained.run, *plain)["results"]
    assert "val" not in results and results["validation_loss"] is None
    assert (results["steps"], results["tested_step"]) == (2, 2)
    assert math.isfinite(results["test"]["loss"])


def test_a_run_to_the_end_says_so(dense):
    results = dense["results"]
    assert (results["steps"], results["stopped_early"]) == (3, False)
    assert results["validation_loss"] < dense["before"]["loss"]


def test_early_stopping_tests_the_best_weights(diverged):
    run, outcome = diverged
    losses, results = validations(run), outcome["results"]
    best = min(losses, key=lambda step: losses[step])
    assert best > 1 and losses[max(losses)] > losses[best]
    assert results["stopped_early"] is True
    assert results["tested_step"] == best
    assert results["steps"] == max(losses) == best + 3 < 40
    assert results["validation_loss"] == losses[best]
    assert results["val"]["loss"] == pytest.approx(losses[best], abs=1e-6)
    assert json.loads((run / "results.json").read_text()) == results
    assert list_steps(run / "checkpoints", "best") == [best]
    reader = open_checkpoint(run / f"checkpoints/best-{best:08d}")
    for name, weight in outcome["weights"].items():
        assert torch.equal(weight, reader.parameter(name)), name


def test_an_early_stopped_run_exports_the_best(diverged, tmp_path):
    run, outcome = diverged
    step = run_ranks(1, export, str(run), str(tmp_path / "model"))[0]
    assert step == outcome["results"]["tested_step"] < outcome["results"]["steps"]
    exported = json.loads((tmp_path / "model/sparse_gpt.json").read_text())
    assert exported["step"] == step


def test_a_finished_run_started_again_reports_the_same(corpus, pretrained, diverged):
    run, outcome = diverged
    again = tuned(corpus, run, pretrained.run, *DIVERGING)
    assert again["before"] is None  # no step was made
    assert any("nothing to do" in line for line in again["said"])
    assert again["results"] == outcome["results"]


def test_word_perplexity_is_of_the_words_of_the_text(dense):
    """Loss a token, spread over white-space words: exp(nats of the split / its words)."""
    for split, first in (("val", 60), ("test", 64)):
        texts = [document(number) for number in range(first, first + 4)]
        words = sum(len(text.split()) for text in texts)
        tokens = sum(len(text.encode()) + 1 for text in texts)  # bytes, and an end token each
        found = dense["results"][split]
        assert found["word_perplexity"] == pytest.approx(
            math.exp(found["loss"] * tokens / words), rel=1e-9
        )
        assert found["token_perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-9)
        assert found["scored_tokens"] == (tokens - 1) // 32 * 32


def test_from_a_hugging_face_folder(corpus, pretrained, tmp_path):
    run_ranks(1, export, str(pretrained.run), str(tmp_path / "model"))
    outcome = tuned(corpus, tmp_path / "run", tmp_path / "model", "max_steps=2")
    assert outcome["before"]["loss"] == pytest.approx(pretrained.loss, abs=1e-6)
    assert outcome["results"]["steps"] == 2
    assert outcome["results"]["weights_outside_masks"] == 0
    refused = tuned(corpus, tmp_path / "sparse", tmp_path / "model", "mode=sparse")
    assert "mode: sparse" in refused["error"] and "has no masks to keep" in refused["error"]
    assert not (tmp_path / "sparse").exists()


def test_another_checkpoint_into_an_old_output_dir(corpus, pretrained, tmp_path):
    first = tuned(corpus, tmp_path / "run", pretrained.run, "max_steps=1")
    assert first["results"]["steps"] == 1
    other = tmp_path / "other"
    run_ranks(1, pretrain, corpus, str(other), SPARSE | {"seed": 5})
    refused = tuned(corpus, tmp_path / "run", other, "max_steps=1")
    assert "source: " in refused["error"] and "output_dir" in refused["error"]
    assert open_checkpoint(pretrained.run).identity in refused["error"]
