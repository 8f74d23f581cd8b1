"""Memory by arithmetic against what autograd really keeps."""

import dataclasses

import pytest
import torch

from sparse_gpt.ift import Transform
from sparse_gpt.memory import activation_bytes, by_stage, states
from sparse_gpt.model.flops import LAYERS
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.ops import Pattern


def gpt_config(
    n_layer: int, checkpointing: bool = False, form: tuple[str, str] | None = None
) -> GPTConfig:
    """`form`: member and non-linearity of every layer, of size 3."""
    layers = (f"h.{n}.{part}" for n in range(n_layer) for part in LAYERS)
    return GPTConfig(
        transform=None if form is None else Transform(*form, dict.fromkeys(layers, 3)),
        n_layer=n_layer,
        n_head=4,
        d_model=64,
        d_ff=192,
        vocab_size=90,
        n_positions=32,
        activation_checkpointing=checkpointing,
    )


def kept_bytes(config: GPTConfig, batch: int, dtype: torch.dtype, patterns: bool) -> int:
    """Storages that the backward of a sparse model keeps, parameters apart.

    Whether its kernel sees the pattern, or computes a dense product over zeros.
    """
    model = GPT(config).to(dtype)
    model.init_weights(seed=0)
    for layer in model.sparse_layers().values():
        pattern = Pattern(torch.rand(layer.weight.shape) < 0.5)
        pattern.apply_(layer.weight.data)
        if patterns:
            layer.pattern = pattern
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(batch, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)
    size = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return size


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_block_keeps(precision, checkpointing, patterns):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    sizes = [kept_bytes(gpt_config(n, checkpointing), 3, dtype, patterns) for n in (2, 5)]
    planned = [activation_bytes(gpt_config(n), 3, 32, precision, checkpointing) for n in (2, 5)]
    # CPU attention keeps its row sums, and LayerNorm its statistics, in the compute type or fp32.
    slack = 0 if precision == "fp32" else 3 * 3 * 32 * (4 * 4 + 16)
    assert abs((planned[1] - planned[0]) - (sizes[1] - sizes[0])) <= slack


@pytest.mark.parametrize("non_linearity", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("member", ["parallel", "factorized", "doped", "low_rank"])
def test_what_transformed_layers_keep(member, non_linearity):
    models = [gpt_config(n, form=(member, non_linearity)) for n in (1, 3)]
    sizes = [kept_bytes(model, 3, torch.float32, False) for model in models]
    planned = [activation_bytes(model, 3, 32, "fp32", False) for model in models]
    assert planned[1] - planned[0] == sizes[1] - sizes[0]
    checkpointed = [activation_bytes(model, 3, 32, "fp32", True) for model in models]
    assert checkpointed[1] - checkpointed[0] == 2 * 3 * 32 * 4 * 64


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_projections_keep(precision):
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    configs = [dataclasses.replace(gpt_config(1), d_embed=width) for width in (None, 40)]
    sizes = [kept_bytes(c, 3, dtype, patterns=False) for c in configs]
    planned = [activation_bytes(c, 3, 32, precision, checkpointing=False) for c in configs]
    assert planned[1] - planned[0] == sizes[1] - sizes[0] > 0


def test_checkpointing_keeps_one_block_whole():
    plain, less = (activation_bytes(gpt_config(1), 3, 32, "fp32", ck) for ck in (False, True))
    assert less - plain == 3 * 32 * 4 * 64


@pytest.mark.parametrize("d_embed", [None, 40])
@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_chunks_keep_their_own_logits(precision, size, d_embed):
    whole = dataclasses.replace(gpt_config(1), d_embed=d_embed)
    planned = [
        activation_bytes(dataclasses.replace(whole, loss_chunk=chunk), 3, 32, precision, False)
        for chunk in (None, 10, 20, 1000)
    ]
    width, a_token = d_embed or 64, 90 * (size + 8)
    summed = 0 if precision == "fp32" else (2 + 4) * 90 * width
    assert planned[0] - planned[1] == (3 * 32 - 10) * a_token - 3 * 32 * size * width - summed
    assert planned[2] - planned[1] == 10 * a_token
    assert planned[3] - planned[2] == (3 * 32 - 20) * a_token  # no longer than there are tokens


def test_views_and_masks_of_compact_storage_are_on_every_rank():
    compact = [states(1000, 700, 1, 5, "fp32", stage, 3, views=11) for stage in (0, 3)]
    assert [(m.masks, m.views) for m in compact] == [(88, 11), (88, 11)]
    assert compact[0].total == 16000 + 88 + 11 + 5


def test_states_of_bf16():
    memory = [states(1000, 0, 1, 0, "bf16", stage, 4) for stage in (1, 2, 3)]
    assert [(m.weights, m.gradients, m.optimizer) for m in memory] == [
        (2000, 4000, 3000),
        (2000, 1000, 3000),
        (500, 1000, 3000),
    ]
    assert memory[2].total == 4500


def test_states_of_fp32():
    memory = [states(1000, 700, 1, 5, "fp32", stage, 3) for stage in range(4)]
    assert [(m.weights, m.gradients, m.optimizer) for m in memory] == [
        (4000, 4000, 8000),
        (4000, 4000, 4008),
        (4000, 1336, 4008),
        (1336, 1336, 4008),
    ]
    assert memory[0].total == 16000 + 88 + 5
    # A bit a weight, sharded with the optimizer; a bit a block on every rank.
    assert [m.masks for m in memory] == [88, 30, 30, 30]
    assert [states(1000, 50, 16, 5, "fp32", stage, 3).masks for stage in (0, 3)] == [7, 7]


def test_bf16_has_no_stage_0():
    with pytest.raises(ValueError, match="no ZeRO stage 0"):
        states(1000, 0, 1, 0, "bf16", 0, 4)
    config = gpt_config(2)
    assert list(by_stage(config, 9, {}, 1, 1, 32, "bf16", 1)) == [1, 2, 3]
    assert list(by_stage(config, 9, {"w": 4}, 1, 1, 32, "fp32", 1)) == [0, 1, 2, 3]
