"""The benchmark of whole steps: that it runs, and that its parts are where the time goes."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.step_parts import PARTS, Parts
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.model.linear import SparseLinear
from sparse_gpt.ops import COMPACT, BlockLayout

ROOT = Path(__file__).resolve().parents[2]


class Slow(torch.autograd.Function):
    """Takes 2 ms forward and 5 ms backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return grads[0]


def slow_kernel(x, operands, activation):
    return tuple(Slow.apply(y) for y in COMPACT["reference"](x, operands, activation))


def test_backward_passes_count_as_their_forward_operations():
    """Of compact layers by their kernel, of others as modules; and calls of given methods."""
    dims = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32}
    layout = BlockLayout((16, 16), (4, 4), torch.arange(8))
    layouts = {f"h.0.attn.{part}.weight": layout for part in "qkvo"}
    model = GPT(GPTConfig(**dims, vocab_size=50, n_positions=8), layouts)
    model.init_weights(0)
    model.h[1].ln_1.register_forward_hook(lambda module, inputs, y: Slow.apply(y))
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.compact_kernel = slow_kernel

    class Controller:
        def before_step(self):
            time.sleep(0.004)

    controller, ids = Controller(), torch.zeros(1, 8, dtype=torch.int64)
    parts = Parts(model, [(controller, "before_step")])
    parts.start()
    start = time.perf_counter()
    model(ids, ids).backward()
    controller.before_step()
    seconds = time.perf_counter() - start
    found = parts.stop(seconds)
    assert list(found) == list(PARTS)
    assert sum(found.values()) == pytest.approx(seconds)
    assert found["linears"] >= 4 * 0.007
    assert found["norms"] >= 0.007
    assert found["topology"] >= 0.004
    for part in ("attention", "embedding", "head"):
        assert found[part] > 0
    assert model.h[0].attn.q.compact_kernel is slow_kernel
    assert "before_step" not in vars(controller)


def test_the_command(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/train_step.py", "--model", "tiny", "--layers", "1"]
    command += ["--vocabulary", "97", "--seq-len", "32", "--rounds", "1", "--threads", "1"]
    command += ["--cases", "step", "--sparsities", "0.75", "--storages", "compact"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["storage"] for row in rows] == ["dense", "compact"]
    dense, compact = (sum(rows[i]["layer_bytes"].values()) for i in (0, 1))
    assert 0.2 < compact / dense < 1.1
    assert rows[1]["target"] == pytest.approx(1.15 * rows[1]["flops_ratio"])
    for row in rows:
        assert row["seconds"] > 0 and row["peak_bytes"] > 1e8
        assert (row["kernel"] in COMPACT) == (row["storage"] == "compact")
    assert [row["update_seconds"] is None for row in rows] == [True, False]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "reached" in done.stdout or "not" in done.stdout
