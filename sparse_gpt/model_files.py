"""What a Hugging Face folder must not ask for: code, pickles, files elsewhere, absurd sizes.

For folders that stock `transformers` will read. Nothing here imports torch or transformers.
"""

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_object

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
)
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
PACKED = 8  # weights in one number, where they are quantised


def refuse_code(folder: Path) -> None:
    """Raise `UserError` where a folder's settings name code to be run, or another model.

    `transformers` asks on the terminal whether to run what `auto_map` names, fetches the kernels
    that an attention implementation of the form `owner/name` names, and loads the model that an
    adapter names in place of the folder's.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder / 'adapter_config.json'}: an adapter names another model to load; merge it "
            "into its model first"
        )
    for name in _SETTINGS:
        path = folder / name
        settings = _read(path) if path.is_file() else {}
        if settings.get("auto_map"):
            raise UserError(
                f"{path}: auto_map names code of its own, which is never run; only models and "
                "tokenizers that transformers has are read"
            )
        for key in _KERNELS:
            if isinstance(settings.get(key), str) and "/" in settings[key]:
                raise UserError(f"{path}: {key}: {settings[key]!r:.80} is code from elsewhere")


def check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raise `UserError` unless the weights are whole safetensors files of the folder, and as many
    as `config` describes. Reads headers alone.

    `transformers` makes what it does not find, or finds in another shape, at random, however large.
    """
    tensors = elements = 0
    for path in _weight_files(folder):
        try:
            with safe_open(path, "numpy") as handle:
                for name in handle.keys():  # noqa: SIM118
                    tensors += 1
                    elements += math.prod(handle.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from None
    layers, weights = _described(config)
    if layers > tensors or weights > elements:
        raise UserError(
            f"{folder / 'config.json'}: it describes {layers} layers and at least {weights} "
            f"weights, but the files hold {tensors:,} tensors of {elements:,}"
        )


def _described(config: dict[str, Any]) -> tuple[int, int]:
    """Layers of a model, and fewer weights than it has, whatever kind it is."""

    def size(*keys: str) -> int:
        given = (config.get(key) for key in keys)
        return next((n for n in given if isinstance(n, int) and n > 0), 0)

    width, layers = size("n_embd", "d_model", "hidden_size"), size("n_layer", "num_hidden_layers")
    inner = size("n_inner", "d_ff", "intermediate_size")
    weights = width * (size("vocab_size") + layers * inner)
    if config.get("model_type") == "gpt2":
        inner = inner or 4 * width
        return layers, width * (size("vocab_size") + size("n_positions")) + layers * (
            4 * width**2 + 2 * width * inner
        )
    return layers, weights // PACKED


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not index.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE}")
    names = _read(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map is missing")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        plain = Path(name).name == name and len(name) <= 200
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map: {name[:80]!r} is no name of a safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing")
    return [folder / name for name in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, unique=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
