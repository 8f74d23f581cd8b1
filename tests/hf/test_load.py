"""Importing GPT-2 folders: what is understood, and what is refused by name."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_gpt.errors import UserError
from sparse_gpt.hf import ImportedWeights, import_folder


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=19,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def folder(tmp_path):
    gpt2().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_config(folder):
    config, _ = import_folder(folder)
    assert (config.d_model, config.d_ff, config.n_layer, config.n_head) == (8, 32, 2, 2)
    assert (config.vocab_size, config.n_positions) == (19, 8)
    assert (config.activation, config.dropout) == ("gelu_new", 0.1)


def test_q_k_v_and_the_transposes(folder):
    _, parameters = import_folder(folder)
    stored = load_file(folder / "model.safetensors")
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    for number, part in enumerate("qkv"):
        expected = fused[:, 8 * number : 8 * (number + 1)].t()
        assert torch.equal(parameters[f"h.1.attn.{part}.weight"], expected)
    expected = stored["transformer.h.0.mlp.c_fc.weight"].t()
    assert torch.equal(parameters["h.0.mlp.fc1.weight"], expected)


def test_without_prefix_with_buffers_and_sharded(tmp_path):
    """The layout of the published gpt2 weights: bare names, causal masks among them."""
    model: Any = gpt2().transformer
    model.save_pretrained(tmp_path / "bare", max_shard_size="2KB")
    assert (tmp_path / "bare" / "model.safetensors.index.json").is_file()
    gpt2().save_pretrained(tmp_path / "prefixed")

    def add_buffers(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edit_weights(tmp_path / "prefixed", add_buffers)
    first = import_folder(tmp_path / "bare")[1]
    second = import_folder(tmp_path / "prefixed")[1]
    assert first.keys() == second.keys()
    assert torch.equal(first["wte.weight"], model.wte.weight)


def test_one_parameter_at_a_time(folder):
    weights = ImportedWeights(folder)
    _, parameters = import_folder(folder)
    assert weights.names == list(parameters)
    assert weights.layers == {}
    with pytest.raises(KeyError):
        weights.mask(weights.names[0], 0, 1)
    for name, tensor in parameters.items():
        assert torch.equal(weights.parameter(name), tensor)
        assert tensor.is_contiguous()


def test_half_precision_becomes_fp32(folder):
    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].half()

    edit_weights(folder, halve)
    _, parameters = import_folder(folder)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'.*only GPT-2"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ({"auto_map": {"AutoModel": "x.y"}}, "config.json: auto_map names code of its own"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: True"),
        ({"scale_attn_weights": False}, "scale_attn_weights: False"),
        ({"add_cross_attention": True}, "add_cross_attention: True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ({"activation_function": "relu"}, "activation_function: 'relu'.*gelu and gelu_new"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attn_pdrop": 0.0}, "attn_pdrop 0.0 differs from embd_pdrop 0.1"),
        ({"n_layer": "2"}, "n_layer: '2' is not a positive number"),
        ({"n_inner": 0}, "n_inner: 0"),
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head"),
        ({"layer_norm_epsilon": "small"}, "config.json: could not convert"),
        ({"n_layer": 3}, "it lacks h.2.ln_1.weight"),
        ({"n_layer": 1}, "unknown tensor h.1"),
        ({"n_positions": 9}, r"wpe.weight is F32 of \(8, 8\), not .* \(9, 8\)"),
    ],
)
def test_refused_configs(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        import_folder(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "who/what"}')
    with pytest.raises(UserError, match=r"adapter_config.json: an adapter names another model"):
        ImportedWeights(folder)


def test_an_untied_head_is_refused(folder):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    edit_weights(folder, untie)
    with pytest.raises(UserError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        import_folder(folder)


def test_integer_weights_are_refused(folder):
    def quantise(tensors):
        tensors["transformer.ln_f.bias"] = torch.zeros(8, dtype=torch.int8)

    edit_weights(folder, quantise)
    with pytest.raises(UserError, match=r"ln_f.bias is I8 of"):
        import_folder(folder)


def test_a_pickle_is_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*safetensors"):
        import_folder(folder)


def test_missing_and_broken_files(folder, tmp_path_factory):
    with pytest.raises(UserError, match=r"no config\.json in"):
        import_folder(tmp_path_factory.mktemp("empty"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="not a safetensors file"):
        import_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        import_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        import_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        import_folder(folder)


def test_an_index_that_points_elsewhere_is_refused(folder):
    index = {"weight_map": {"wte.weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a path, not a file name"):
        import_folder(folder)
