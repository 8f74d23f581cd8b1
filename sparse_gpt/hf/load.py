"""Read a Hugging Face folder, GPT-2's or our own: safetensors and JSON, nothing that runs code."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.errors import UserError
from sparse_gpt.hf.layout import INDEX_FILE, MODEL_TYPE, WEIGHTS_FILE, Entry, layout, prefix
from sparse_gpt.json_file import read_object
from sparse_gpt.model.gpt import GPTConfig, check_modules
from sparse_gpt.model_files import PICKLES, refuse_code
from sparse_gpt.ops import ACTIVATIONS

# What GPT2Config assumes where config.json is silent, for every key that changes the function.
_DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "embd_pdrop": 0.1,
    "n_inner": None,
}
_REQUIRED_VALUES: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
# The causal masks that old exports keep beside the weights.
_BUFFER = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file, by the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, last: slice = slice(None)) -> Tensor:
        """The tensor, or a range of its last axis."""
        try:
            with safe_open(self.file, "pt") as handle:
                part = handle.get_slice(self.name)
                return part[:, last] if len(self.shape) == 2 else part[last]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file}: {self.name}: {error}") from None


class ImportedWeights:
    """A folder as a source of weights: the config, and any parameter of `GPT` by name.

    Reads safetensors of GPT-2 or of `hf.model`, in one file or sharded, with or without the prefix
    (`transformer.`, `gpt.`); opening
    checks names and shapes and reads no weights. Raises `UserError` for another architecture, a
    config feature that `GPT` does not have (naming the key), weights that are a pickle, and
    tensors missing, unknown or of another shape.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        refuse_code(self.path)
        self.gpt_config = _read_config(self.path)
        self._stored = _stored_tensors(self.path, prefix(self.gpt_config))
        try:
            check_modules(self.gpt_config, len(self._stored))
        except ValueError as error:
            raise UserError(f"{self.path / 'config.json'}: {error}") from None
        entries = list(layout(self.gpt_config))
        self._sources = {
            source: (entry, number)
            for entry in entries
            for number, source in enumerate(entry.sources)
        }
        self.names = list(self._sources)
        self._check(entries)

    def _check(self, entries: list[Entry]) -> None:
        expected = {entry.name for entry in entries} | {"lm_head.weight"}
        unknown = [n for n in self._stored if n not in expected and not _BUFFER.match(n)]
        missing = [entry.name for entry in entries if entry.name not in self._stored]
        if unknown or missing:
            what = f"lacks {missing[0]}" if missing else f"holds the unknown tensor {unknown[0]}"
            raise UserError(f"{self.path}: not the weights of its config.json: it {what}")
        for entry in entries:
            stored = self._stored[entry.name]
            if stored.shape != entry.shape or stored.dtype not in _FLOATS:
                raise UserError(
                    f"{stored.file}: {stored.name} is {stored.dtype} of {stored.shape}, not "
                    f"floating point of {entry.shape} as config.json says"
                )
        head = self._stored.get("lm_head.weight")
        if head is not None and not torch.equal(head.read(), self._stored["wte.weight"].read()):
            raise UserError(
                f"{self.path}: lm_head.weight differs from wte.weight; an untied head "
                "(tie_word_embeddings: false) is not supported"
            )

    def parameter(self, name: str) -> Tensor:
        """A whole parameter, fp32, in its shape; reads nothing else."""
        entry, number = self._sources[name]
        width = entry.shape[-1] // len(entry.sources)
        part = slice(number * width, (number + 1) * width)
        if len(entry.sources) == 1:
            part = slice(None)
        tensor = self._stored[entry.name].read(part)
        return (tensor.t() if entry.transposed else tensor).contiguous().float()

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the training tokenizer, for folders that we exported; None for others'."""
        if not (self.path / "sparse_gpt.json").is_file():
            return None
        has_tokenizer = (self.path / "tokenizer.json").is_file()
        return load_tokenizer(self.path).sha256 if has_tokenizer else None

    @property
    def identity(self) -> str:
        """A digest of the config and of the weight files."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({stored.file for stored in self._stored.values()}):
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()

    @property
    def layers(self) -> dict[str, Any]:
        """No sparse layers: a folder holds a dense model."""
        return {}

    def mask(self, name: str, start: int, count: int, trained: bool = False) -> Tensor:
        """There is none; raises `KeyError`."""
        raise KeyError(name)


def import_folder(path: Path | str) -> tuple[GPTConfig, dict[str, Tensor]]:
    """A folder's config and every parameter of `GPT` by name, fp32; see `ImportedWeights`."""
    weights = ImportedWeights(path)
    return weights.gpt_config, {name: weights.parameter(name) for name in weights.names}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, unique=False)
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}: not a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def _read_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    given = _read_json(path)
    if given.get("model_type") == MODEL_TYPE:
        return _own_config(path, given)
    names = given.get("architectures") or ["GPT2LMHeadModel"]
    first = names[0] if isinstance(names, list) else None
    if given.get("model_type") != "gpt2" or first not in ("GPT2LMHeadModel", "GPT2Model"):
        kind = f"model_type {given.get('model_type')!r:.40}, architectures {names!s:.80}"
        raise UserError(f"{path}: {kind}: only GPT-2 (GPT2LMHeadModel) can be imported")
    for key, value in _REQUIRED_VALUES.items():
        if given.get(key, value) != value:
            raise UserError(f"{path}: {key}: {given[key]!s:.40} is not supported, only {value}")
    for key in ("quantization_config", "pruned_heads"):
        if given.get(key):
            raise UserError(f"{path}: {key} is not supported; export plain weights")
    values = {**_DEFAULTS, **given}
    for key in ("resid_pdrop", "attn_pdrop"):
        if values.get(key, 0.1) != values["embd_pdrop"]:
            raise UserError(
                f"{path}: {key} {values.get(key, 0.1)!s:.40} differs from embd_pdrop "
                f"{values['embd_pdrop']!s:.40}; one dropout for all is supported, make them equal"
            )
    if values["activation_function"] not in tuple(ACTIVATIONS):
        raise UserError(
            f"{path}: activation_function: {values['activation_function']!r:.40} is not supported, "
            f"only {' and '.join(ACTIVATIONS)}"
        )
    _check_positive(path, values, "n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    inner = values["n_inner"]
    if inner is not None and (type(inner) is not int or inner < 1):
        raise UserError(f"{path}: n_inner: {inner!r:.40} is not a positive number")
    if values["n_embd"] % values["n_head"]:
        raise UserError(f"{path}: n_embd {values['n_embd']} is not divisible by n_head")
    try:
        return GPTConfig(
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            d_model=values["n_embd"],
            d_ff=inner or 4 * values["n_embd"],
            vocab_size=values["vocab_size"],
            n_positions=values["n_positions"],
            activation=values["activation_function"],
            dropout=float(values["embd_pdrop"]),
            layer_norm_epsilon=float(values["layer_norm_epsilon"]),
            init_std=float(values["initializer_range"]),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None


def _check_positive(path: Path, values: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if type(values.get(key)) is not int or values[key] < 1:
            raise UserError(f"{path}: {key}: {values.get(key)!r:.40} is not a positive number")


def _own_config(path: Path, given: dict[str, Any]) -> GPTConfig:
    """The model of a folder of our own: the fields of `GPTConfig` under their own names."""
    _check_positive(path, given, "n_layer", "n_head", "d_model", "d_ff")
    _check_positive(path, given, "vocab_size", "n_positions")
    if given.get("activation") not in tuple(ACTIVATIONS):
        raise UserError(
            f"{path}: activation: {given.get('activation')!r:.40} is none of "
            f"{', '.join(ACTIVATIONS)}"
        )
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    try:
        return GPTConfig.from_dict({key: given[key] for key in names & given.keys()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _stored_tensors(folder: Path, before: str) -> dict[str, _Stored]:
    """Every tensor of a folder, by its name without prefix."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: weight_map is missing")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file or len(file) > 200:
                raise UserError(f"{index}: weight_map: {file[:80]!r} is a path, not a file name")
    else:
        files = [WEIGHTS_FILE]
    stored: dict[str, _Stored] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise UserError(_missing(path))
        try:
            with safe_open(path, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    tensor = _Stored(path, name, tuple(part.get_shape()), part.get_dtype())
                    stored[name.removeprefix(before)] = tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a safetensors file: {error}") from None
    return stored


def _missing(path: Path) -> str:
    pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in PICKLES)
    if not pickles:
        return f"{path} is missing"
    return (
        f"{path.parent / pickles[0]} is a pickle, which can run code when it is read; "
        "save the model with safetensors (model.safetensors)"
    )
