"""Folders of our own model class: exact round trips, and everything that reads a folder."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_gpt.errors import UserError
from sparse_gpt.hf import ImportedWeights, import_folder
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.hf.generate import generate
from sparse_gpt.hf.model import SparseGPTForCausalLM
from sparse_gpt.ift import Transform
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.ops import Pattern
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.hf.checkpoints import sparse_model, write_run, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("parallel", "factorized", "doped", "low_rank")


def transformed_model(member: str) -> GPT:
    """A small GPT in a member's form but for one layer, half of its sparse weights masked.

    Or, by the name `projected`, one of plain layers with a narrower embedding.
    """
    plain = GPTConfig(n_layer=2, n_head=2, d_model=16, d_ff=40, vocab_size=257, n_positions=48)
    sizes = {layer: 3 for layer in plain.layer_shapes if layer != "h.0.attn.k"}
    if member == "projected":
        model = GPT(replace(plain, d_embed=12)).eval()
    else:
        model = GPT(replace(plain, transform=Transform(member, "gelu", sizes))).eval()
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.sparse_layers().items():
        if name != "h.0.attn.k.weight":
            layer.pattern = Pattern(torch.rand(layer.weight.shape, generator=generator) < 0.5)
            layer.pattern.apply_(layer.weight.data)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture(scope="module", params=[*FORMS, "projected"])
def member(request):
    return request.param


@pytest.fixture(scope="module")
def run(member, tmp_path_factory):
    folder = tmp_path_factory.mktemp(member)
    write_run(folder, transformed_model(member))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(run):
    export_checkpoint(run, run / "export")
    return run / "export"


IDS = torch.arange(40).view(2, 20) * 7 % 257


def test_checkpoint_and_export_keep_every_parameter(member, run, folder):
    model = transformed_model(member)
    reader = open_checkpoint(run)
    assert reader.gpt_config == model.config
    config, parameters = import_folder(folder)
    assert config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.parameter(name), parameter)
        assert torch.equal(parameters[name], parameter)
    assert set(parameters) == {name for name, _ in model.named_parameters()}


def test_the_auto_class_computes_the_same(member, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert type(loaded) is SparseGPTForCausalLM and not loaded.training
    assert {file.suffix for file in folder.iterdir()} <= {".json", ".safetensors", ".txt"}
    model = transformed_model(member)
    with torch.no_grad():
        out = loaded(IDS, labels=IDS)
        expected = model(IDS)
        assert torch.equal(out.logits, expected)
        assert torch.equal(loaded(IDS, logits_to_keep=3).logits, expected[:, -3:])
        some = torch.tensor([0, 7])
        assert torch.equal(loaded(IDS, logits_to_keep=some).logits, expected[:, some])
        targets = torch.full_like(IDS, -100)
        targets[:, :-1] = IDS[:, 1:]
        torch.testing.assert_close(out.loss, model(IDS, targets))
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.max_position_embeddings, config.eos_token_id) == (
        16,
        48,
        256,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(member, folder, side):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    row, pad = IDS[:1, :9], torch.full((1, 4), 255)
    ids = torch.cat([pad, row] if side == "left" else [row, pad], 1)
    part = slice(4, None) if side == "left" else slice(None, 9)
    mask = torch.zeros_like(ids)
    mask[:, part] = 1
    with torch.no_grad():
        logits = loaded(ids, attention_mask=mask).logits[:, part]
        torch.testing.assert_close(logits, loaded(row).logits, rtol=1e-5, atol=1e-6)


def test_saved_again_by_transformers(member, folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    assert import_folder(tmp_path / "again")[0] == transformed_model(member).config


def test_generation_is_our_models_own_choice(member, folder):
    text = generate(folder, "mask ", temperature=0, max_new_tokens=6)
    model, ids = transformed_model(member), list(b"mask ")
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == 256:
                break
    assert text == bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def doped(tmp_path_factory):
    run = tmp_path_factory.mktemp("doped")
    write_run(run, transformed_model("doped"))
    assert "sparse_gpt.hf.model is imported" in export_checkpoint(run, run / "export").summary()
    return run / "export"


@pytest.fixture
def broken(doped, tmp_path):
    return Path(shutil.copytree(doped, tmp_path / "broken"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": "2"}, "n_layer: '2' is not a positive number"),
        ({"activation": "swish"}, "activation: 'swish' is none of gelu"),
        ({"transform": {"member": "none"}}, "config.json"),
        ({"transform": None, "n_layer": 1}, "not the weights of its config.json"),
        ({"n_head": 3}, "not divisible by n_head 3"),
    ],
)
def test_broken_configs_are_refused(broken, changes, message):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        ImportedWeights(broken)


def test_plain_models_stay_gpt2(tmp_path):
    write_run(tmp_path / "run", sparse_model())
    assert "hf.model" not in export_checkpoint(tmp_path / "run", tmp_path / "out").summary()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"


def test_importing_the_library_leaves_transformers_alone():
    """A training rank has no use for it, and its import takes seconds."""
    code = "import sys, sparse_gpt.hf; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
