"""Write a Hugging Face folder, one tensor in memory at a time."""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.data.tokenizer import copy_tokenizer
from sparse_gpt.durable import fsync_path, write_json
from sparse_gpt.errors import UserError
from sparse_gpt.hf.layout import (
    INDEX_FILE,
    METADATA_FILE,
    MODEL_TYPE,
    WEIGHTS_FILE,
    Entry,
    is_gpt2,
    layout,
    prefix,
)
from sparse_gpt.model.gpt import GPTConfig

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}
MAX_SHARD_BYTES = 5 * 10**9


def _hf_config(config: GPTConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    if not is_gpt2(config):
        return {
            "architectures": ["SparseGPTForCausalLM"],
            "model_type": MODEL_TYPE,
            "dtype": dtype,
            **dataclasses.asdict(config),
            "tie_word_embeddings": True,
            "use_cache": False,
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_positions": config.n_positions,
        "vocab_size": config.vocab_size,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.init_std,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
    }


def export_folder(
    parameters: Callable[[str], Tensor],
    config: GPTConfig,
    out: Path,
    *,
    tokenizer_path: Path | None = None,
    dtype: str = "float32",
    metadata: dict[str, Any] | None = None,
    eos_id: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a folder that stock `transformers` loads as GPT2LMHeadModel; returns its bytes.

    Where GPT-2 cannot express the model, a folder of `hf.model.SparseGPTForCausalLM`.
    `parameters(name)` gives a parameter of `GPT` by name; one tensor is held at a time. The
    tokenizer of `tokenizer_path` goes beside the weights in canonical form, `metadata` to
    `sparse_gpt.json`. The folder appears under its name only when complete. Raises `UserError`
    for an unknown dtype, a tokenizer that cannot be read, a folder in use (without `overwrite`,
    or one that was not made here) and too little disk.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    out = Path(os.path.abspath(out))
    _check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    shards = _shards(list(layout(config)), DTYPES[dtype][0].itemsize, max_shard_bytes)
    needed = sum(_nbytes(entry, DTYPES[dtype][0].itemsize) for shard in shards for entry in shard)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"--out {out}: the export needs {needed:,} bytes and the disk has {free:,} free"
        )
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        if tokenizer_path is not None:
            copy_tokenizer(tokenizer_path, partial)
        _write_weights(partial, shards, parameters, dtype, prefix(config))
        write_json(partial / "config.json", _hf_config(config, dtype, eos_id))
        tokens = {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
        write_json(partial / "generation_config.json", tokens)
        write_json(partial / METADATA_FILE, metadata or {})
        size = sum(file.stat().st_size for file in partial.iterdir())
        _publish(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return size


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder that does not exist yet")
    if any(out.iterdir()):
        if not overwrite:
            raise UserError(f"--out {out} is not empty; choose another folder or add --overwrite")
        if not (out / METADATA_FILE).is_file():
            raise UserError(
                f"--out {out} holds no {METADATA_FILE}, so it was not exported by this program "
                "and is not overwritten; choose another folder"
            )


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name; an old one is out of the way before it is deleted."""
    fsync_path(partial)
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    fsync_path(out.parent)
    if old.exists():
        shutil.rmtree(old)


def _nbytes(entry: Entry, itemsize: int) -> int:
    return itemsize * torch.Size(entry.shape).numel()


def _shards(entries: list[Entry], itemsize: int, limit: int) -> list[list[Entry]]:
    """Consecutive runs of at most `limit` bytes; a tensor larger than that has its own."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        size = _nbytes(entry, itemsize)
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += size
    return shards


def _write_weights(
    folder: Path,
    shards: list[list[Entry]],
    parameters: Callable[[str], Tensor],
    dtype: str,
    before: str,
) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = WEIGHTS_FILE
        total += _write_safetensors(folder / file, shard, parameters, dtype, before)
        weight_map.update({before + entry.name: file for entry in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)


def _write_safetensors(
    path: Path,
    entries: list[Entry],
    parameters: Callable[[str], Tensor],
    dtype: str,
    before: str,
) -> int:
    """Stream a safetensors file: the header follows from shapes, then one tensor at a time.

    The library's own writer wants every tensor of the file in memory at once.
    """
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + _nbytes(entry, torch_dtype.itemsize)
        header[before + entry.name] = {
            "dtype": code,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = _assemble(entry, parameters).to(torch_dtype)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return offset


def _assemble(entry: Entry, parameters: Callable[[str], Tensor]) -> Tensor:
    parts = [parameters(source).detach().cpu() for source in entry.sources]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = (tensor.t() if entry.transposed else tensor).contiguous()
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name}: {tuple(tensor.shape)} in place of {entry.shape}")
    return tensor
