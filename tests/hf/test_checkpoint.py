"""Exporting checkpoints: exact weights, the training tokenizer, and no damaged models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sparse_gpt.data import corpus
from sparse_gpt.data.holdout import HoldoutRule
from sparse_gpt.data.prepare import PrepareOptions, prepare
from sparse_gpt.data.shards import open_data
from sparse_gpt.data.tokenizer import byte_tokenizer, copy_tokenizer
from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from sparse_gpt.hf import import_folder
from sparse_gpt.hf.checkpoint import check_zeros, export_checkpoint
from sparse_gpt.ops import Pattern
from sparse_gpt.train.manifest import write_manifest
from tests.data.fixtures import AWKWARD
from tests.hf.checkpoints import sparse_model, write_run, write_tokenizer
from tests.tiny import document

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, sparse_model())
    write_tokenizer(folder)
    return folder


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "export_hf.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_weights_and_facts(run, tmp_path):
    model = sparse_model()
    result = export_checkpoint(run, tmp_path / "out")
    config, parameters = import_folder(tmp_path / "out")
    assert config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter)

    facts = json.loads((tmp_path / "out" / "sparse_gpt.json").read_text())
    patterns = {n: m.pattern for n, m in model.sparse_layers().items() if m.pattern}
    active = sum(8 * int(p.active.sum()) for p in patterns.values())
    dense = sum(p.expand().numel() for p in patterns.values())
    total = sum(p.numel() for p in model.parameters())
    assert (facts["step"], facts["tokens"], facts["flops_spent"]) == (12, 4096, 10**20)
    assert facts["parameters"] == result.parameters == total
    assert facts["active_parameters"] == result.active_parameters == total - dense + active
    assert facts["sparsity"] == result.sparsity == 1 - active / dense
    layer = facts["layers"]["h.1.mlp.fc1.weight"]
    pattern = patterns["h.1.mlp.fc1.weight"]
    assert layer == {"shape": [40, 16], "block": [4, 2], "active": 8 * int(pattern.active.sum())}
    assert facts["config"] == {"name": "fixture"}
    assert result.bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_a_dense_phase_is_exported_with_a_warning(run, tmp_path):
    assert "warning" not in export_checkpoint(run, tmp_path / "out").summary()
    step = run / "checkpoints/step-00000012"
    manifest = json.loads((step / "manifest.json").read_text())
    for entry in manifest["layers"].values():
        entry["target"] = entry["active"] // 2
    write_manifest(step, manifest)
    summary = export_checkpoint(run, tmp_path / "dense").summary()
    assert "warning: this checkpoint was saved before its method reached its sparsity" in summary


def test_a_step_folder_and_a_newer_step(tmp_path):
    old = write_run(tmp_path / "run", sparse_model(), step=5)
    write_run(tmp_path / "run", sparse_model(), step=12)
    assert export_checkpoint(tmp_path / "run", tmp_path / "a").step == 12
    assert export_checkpoint(old, tmp_path / "b").step == 5


def test_a_dense_checkpoint(tmp_path):
    model = sparse_model()
    for layer in model.sparse_layers().values():
        layer.pattern = None
    write_run(tmp_path / "run", model)
    result = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert result.sparsity == 0.0
    assert result.active_parameters == result.parameters
    assert "no tokenizer: weights only" in result.summary()


def test_a_stray_weight_is_refused(tmp_path):
    model = sparse_model()
    layer = model.sparse_layers()["h.1.attn.k.weight"]
    assert layer.pattern is not None
    row, column = (~layer.pattern.expand()).nonzero()[7].tolist()
    layer.weight.data[row, column] = 1e-30
    write_run(tmp_path / "run", model)
    with pytest.raises(UserError, match=r"h\.1\.attn\.k\.weight: 1 weights outside"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-45])
def test_no_stray_value_is_small_enough(value):
    pattern = Pattern(torch.tensor([[True, False], [False, True]]))
    weight = torch.eye(2)
    check_zeros("w", weight, pattern)
    weight[0, 1] = value
    with pytest.raises(UserError, match="w: 1 weights"):
        check_zeros("w", weight, pattern)


def test_active_weights_may_be_zero():
    check_zeros("w", torch.zeros(2, 2), Pattern(torch.ones(2, 2, dtype=torch.bool)))
    check_zeros("w", torch.full((2, 2), -0.0), Pattern(torch.zeros(2, 2, dtype=torch.bool)))


def test_a_damaged_file_is_refused(run, tmp_path):
    file = run / "checkpoints" / "step-00000012" / "master-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"sha256 of master-00001\.safetensors is wrong"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXTS = [
    "The mask widens the layer.\n\tAn indented line,  two blanks\n\n",
    "naïve café — 東京 🙂 \u00a0end",
    "<|endoftext|>",
    "",
    " leading and trailing ",
]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece"])
def test_auto_tokenizer_gives_the_training_ids(tmp_path, kind):
    if kind == "bytes":
        tokenizer = byte_tokenizer()
    else:
        tokenizer = train_tokenizer(
            kind, iter([f"{text} {i}" for i in range(60) for text in TEXTS]), 360
        )
    write_run(tmp_path / "run", sparse_model(vocab_size=tokenizer.vocab_size))
    tokenizer.save(tmp_path / "run" / "tokenizer")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_auto_tokenizer_gives_the_ids_of_a_thousand_documents(tmp_path, kind):
    """The ids in prepared shards, against AutoTokenizer on the exported folder."""
    texts = tmp_path / "texts"
    texts.mkdir()
    documents = [document(i) + AWKWARD[i % len(AWKWARD)] for i in range(1000)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (texts / "all.jsonl").write_text(rows, encoding="utf-8")
    options = PrepareOptions(
        out=tmp_path / "data",
        sources={"train": corpus.files([texts])},
        tokenizer=kind,
        vocab_size=400,
        holdout=HoldoutRule(seed=0, val_fraction=0.0),
        workers=1,
    )
    prepare(options)
    data = open_data(tmp_path / "data")
    write_run(tmp_path / "run", sparse_model(vocab_size=data.vocab_size))
    copy_tokenizer(tmp_path / "data" / "tokenizer", tmp_path / "run" / "tokenizer")
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    split = data.split("train")
    starts = split.document_starts[:]
    assert split.n_documents == len(documents)
    for i, text in enumerate(documents):
        start, end = int(starts[i]), int(starts[i + 1])
        ids = split.read(start, end - start).tolist()
        assert ids == [*theirs(text)["input_ids"], theirs.eos_token_id]


def test_the_command(run, tmp_path):
    done = export(run, "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert f"exported step 12 to {tmp_path / 'out'}\n" in done.stdout
    assert "sparsity of the sparse layers 0.685764" in done.stdout
    parameters = import_folder(tmp_path / "out")[1]
    expected = sparse_model().wte.weight.bfloat16().float()
    assert torch.equal(parameters["wte.weight"], expected)

    again = export(run, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert again.stderr.startswith("error: --out") and again.stderr.count("\n") == 1
    assert export(run, "--out", tmp_path / "out", "--overwrite").returncode == 0


def test_no_checkpoint(tmp_path):
    done = export(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr == f"error: no checkpoint at {tmp_path}: no manifest.json there\n"
