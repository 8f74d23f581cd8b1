"""Our GPT and Hugging Face's GPT-2 are one function: logits and gradients, weights moved across."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_gpt.hf import export_folder, import_folder
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.ops import Pattern


def random_gpt2(activation: str, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=61,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=72,
        activation_function=activation,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=60,
        eos_token_id=60,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # large enough that the two GELUs and every bias matter
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def imported(folder) -> GPT:
    config, parameters = import_folder(folder)
    model = GPT(config)
    model.load_state_dict(parameters)
    return model


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_and_gradients_equal_gpt2(tmp_path, activation):
    theirs = random_gpt2(activation)
    theirs.save_pretrained(tmp_path)
    ours = imported(tmp_path)
    ids = torch.randint(0, 61, (3, 24))
    expected = theirs(ids, labels=ids)
    logits = ours(ids)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)

    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    loss = ours(ids, targets)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.loss.backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in ours.named_parameters()}
    checked = set()
    for name, parameter in theirs.transformer.named_parameters():
        assert parameter.grad is not None
        if "c_attn" in name:
            sources = [name.replace("c_attn", part) for part in ("q", "k", "v")]
        else:
            ours_name = name.replace("c_fc", "fc1").replace("mlp.c_proj", "mlp.fc2")
            sources = [ours_name.replace("attn.c_proj", "attn.o")]
        got = torch.cat([grads[source] for source in sources])
        transposed = name.endswith("weight") and ".c_" in name
        got = got.t() if transposed else got
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=float(1e-5 * scale))
        checked.update(sources)
    assert checked == set(grads)


def test_the_two_activations_are_not_the_same(tmp_path):
    """The parity above would see a swapped GELU."""
    theirs = random_gpt2("gelu")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["activation_function"] = "gelu_new"
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 61, (3, 24))
    assert (imported(tmp_path)(ids) - theirs(ids).logits).abs().max() > 1e-4


READER = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert not any(name.split(".")[0] == "sparse_gpt" for name in sys.modules)
ids = load_file(sys.argv[2])["ids"]
save_file({"logits": model(ids).logits.float().contiguous()}, sys.argv[3])
"""


def sparse_model() -> GPT:
    """A masked GPT whose stored weights are exact zeros outside the patterns."""
    config = GPTConfig(
        n_layer=2, n_head=3, d_model=48, d_ff=96, vocab_size=50, n_positions=16, dropout=0.1
    )
    model = GPT(config).eval()
    model.init_weights(seed=1)
    torch.manual_seed(0)
    for layer in model.sparse_layers().values():
        out, inner = layer.weight.shape
        layer.pattern = Pattern(torch.rand(out // 4, inner // 4) < 0.25, (4, 4))
        layer.pattern.apply_(layer.weight.data)
        layer.bias.data.normal_()
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_sparse_model_in_a_process_with_transformers_alone(tmp_path, dtype):
    model = sparse_model()
    export_folder(model.get_parameter, model.config, tmp_path / "hf", eos_id=0, dtype=dtype)
    ids = torch.randint(0, 50, (2, 16))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    (tmp_path / "reader.py").write_text(READER)
    subprocess.run(
        [sys.executable, "reader.py", "hf", "ids.safetensors", "logits.safetensors"],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.no_grad():
        expected = model.to(getattr(torch, dtype))(ids).float()
    tolerance = 1e-5 if dtype == "float32" else 0.02
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
