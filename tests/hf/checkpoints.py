"""Checkpoints for tests, written file by file without an engine."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from sparse_gpt.data.tokenizer import byte_tokenizer
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.ops import Pattern
from sparse_gpt.train import checkpoint_files as files
from sparse_gpt.train.manifest import FORMAT, write_manifest


def sparse_model(vocab_size: int = 257) -> GPT:
    """A small GPT with 4 x 2 blocks in every linear layer, zeros outside."""
    config = GPTConfig(
        n_layer=2, n_head=2, d_model=16, d_ff=40, vocab_size=vocab_size, n_positions=48
    )
    model = GPT(config).eval()
    model.init_weights(seed=3)
    generator = torch.Generator().manual_seed(0)
    for layer in model.sparse_layers().values():
        out, inner = layer.weight.shape
        active = torch.rand(out // 4, inner // 2, generator=generator) < 0.3
        layer.pattern = Pattern(active, (4, 2))
        layer.pattern.apply_(layer.weight.data)
    return model


def write_run(run: Path, model: GPT, step: int = 12, ranks: int = 2) -> Path:
    """A run folder with one checkpoint of `ranks` ranks, cut as ZeRO would; returns the step's."""
    folder = run / "checkpoints" / files.step_folder(step)
    folder.mkdir(parents=True)
    entries = {}
    patterns = {n: m.pattern for n, m in model.sparse_layers().items() if m.pattern is not None}
    for rank in range(ranks):
        tensors, ranges = {}, {}
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1).numpy()
            start, end = rank * flat.size // ranks, (rank + 1) * flat.size // ranks
            tensors[name], ranges[name] = flat[start:end].copy(), (start, end - start)
        file = f"master-{rank:05d}.safetensors"
        entries[file] = files.write_tensors(folder / file, tensors, ranges)
        bits: dict[str, np.ndarray] = {}
        ranges = {}
        for name, pattern in patterns.items():
            flags = pattern.active.reshape(-1)
            start, end = rank * flags.numel() // ranks, (rank + 1) * flags.numel() // ranks
            bits[name] = np.packbits(flags[start:end].numpy())
            ranges[name] = (start, end - start)
        file = f"topology-{rank:05d}.safetensors"
        entries[file] = files.write_tensors(folder / file, bits, ranges)
    manifest = {
        "format": FORMAT,
        "step": step,
        "state": {"step": step, "tokens": 4096, "flops_spent": 10**20},
        "gpt_config": dataclasses.asdict(model.config),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "layers": {
            name: {
                "grid": list(pattern.active.shape),
                "block": list(pattern.block),
                "active": int(pattern.active.sum()),
            }
            for name, pattern in patterns.items()
        },
        "topology_digest": "0" * 64,
        "files": entries,
        "config": {"name": "fixture"},
        "eos_id": 256,
    }
    write_manifest(folder, manifest)
    return folder


def write_tokenizer(run: Path) -> None:
    byte_tokenizer().save(run / "tokenizer")
