"""How GPT-2's tensors are made of ours.

q, k and v are separate here and one `c_attn` there; GPT-2's linear weights are `[in, out]`, ours
`[out, in]`. Everything else is a renaming, so a round trip is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sparse_gpt.model.gpt import GPTConfig

METADATA_FILE = "sparse_gpt.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor of the folder and the parameters of ours that make it, stacked along `out`."""

    name: str  # without the prefix "transformer."
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


def layout(config: GPTConfig) -> Iterator[Entry]:
    """Every tensor of a GPT-2 folder, in the order of the model."""
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
