"""How a folder's tensors are made of ours.

A GPT-2 folder: q, k and v are separate here and one `c_attn` there; GPT-2's linear weights are
`[in, out]`, ours `[out, in]`. Everything else is a renaming, so a round trip is exact. What GPT-2
cannot express goes into a folder of our own model class (`hf.model`), under our own names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_gpt.model.gpt import GPT, GPTConfig

METADATA_FILE = "sparse_gpt.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_TYPE = "sparse_gpt"  # of our own model class


@dataclass(frozen=True)
class Entry:
    """A tensor of the folder and the parameters of ours that make it, stacked along `out`."""

    name: str  # without the prefix
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


def is_gpt2(config: GPTConfig) -> bool:
    """Whether stock GPT-2 computes the same function."""
    return config.transform is None and config.d_embed is None


def prefix(config: GPTConfig) -> str:
    """What stands before the names of a folder's tensors."""
    return "transformer." if is_gpt2(config) else "gpt."


def layout(config: GPTConfig) -> Iterator[Entry]:
    """Every tensor of a folder, in the order of the model."""
    if is_gpt2(config):
        yield from _gpt2_layout(config)
        return
    with torch.device("meta"):
        model = GPT(config)
    for name, parameter in model.named_parameters():
        yield Entry(name, (name,), tuple(parameter.shape))


def _gpt2_layout(config: GPTConfig) -> Iterator[Entry]:
    d, f = config.d_model, config.d_ff
    yield Entry("wte.weight", ("wte.weight",), (config.vocab_size, d))
    yield Entry("wpe.weight", ("wpe.weight",), (config.n_positions, d))
    for n in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                name = f"h.{n}.{norm}.{part}"
                yield Entry(name, (name,), (d,))
        for theirs, ours, inner, out in (
            ("attn.c_attn", ("attn.q", "attn.k", "attn.v"), d, 3 * d),
            ("attn.c_proj", ("attn.o",), d, d),
            ("mlp.c_fc", ("mlp.fc1",), d, f),
            ("mlp.c_proj", ("mlp.fc2",), f, d),
        ):
            weights = tuple(f"h.{n}.{layer}.weight" for layer in ours)
            biases = tuple(f"h.{n}.{layer}.bias" for layer in ours)
            yield Entry(f"h.{n}.{theirs}.weight", weights, (inner, out), transposed=True)
            yield Entry(f"h.{n}.{theirs}.bias", biases, (out,))
    for part in ("weight", "bias"):
        yield Entry(f"ln_f.{part}", (f"ln_f.{part}",), (d,))
