"""Whole folders to spoil: a checkpoint whose manifest vouches for it, a small GPT-2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from sparse_gpt.data.tokenizer import byte_tokenizer
from sparse_gpt.durable import sha256_file
from sparse_gpt.hf import export_folder
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.train.manifest import digest_of, write_manifest


def resign(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make a checkpoint's manifest say what its files are now, and that after `edit`."""
    manifest = signed(folder)
    edit(manifest)
    write_manifest(folder, manifest)


def signed(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest with the sizes and digests of its files as they are, and its own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for path in folder.glob("*.safetensors"):
        entry = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        manifest["files"][path.name] = entry
    return {**manifest, "sha256": digest_of(manifest)}


def put(path: Path, content: bytes) -> None:
    """Write a file as a new one: what is cut to nothing and written again goes to the disk at once,
    which takes ten times as long as the reading."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def gpt2_folder(folder: Path) -> Path:
    """A GPT-2 of one layer with a tokenizer of bytes, as `export_folder` writes it."""
    config = GPTConfig(n_layer=1, n_head=2, d_model=8, d_ff=16, vocab_size=257, n_positions=8)
    model = GPT(config)
    model.init_weights(seed=1)
    weights = dict(model.named_parameters())
    byte_tokenizer().save(folder.parent / "tokenizer")
    export_folder(
        lambda name: weights[name], config, folder, tokenizer_path=folder.parent / "tokenizer",
        eos_id=256,
    )  # fmt: skip
    return folder


def edit_json(path: Path, change: Callable[[Any], object]) -> Path:
    """Change the value in a JSON file in place."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    return path


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file of any header, and any claim of that header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    path.write_bytes((claimed % 2**64).to_bytes(8, "little") + text + data)


def tensors(path: Path, **arrays: torch.Tensor) -> None:
    """A valid safetensors file."""
    save_file({name: tensor.numpy() for name, tensor in arrays.items()}, path)
