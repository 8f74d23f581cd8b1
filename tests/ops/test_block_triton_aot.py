"""The Triton kernels compiled to sm_90, without a GPU: tensor cores are used, nothing spills."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.triton_aot import LAYERS, calls, compile_call, element_wise, model
from sparse_gpt.ops.triton_configs import HALF, SINGLE, SINGLE_TALL, Tile

RECORD = Path(__file__).resolve().parents[2] / "docs/benchmarks/triton_sm90.json"
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))


def check(kernel: str, tile: Tile | None, call, tensor_cores: bool) -> None:
    made = compile_call(call)
    where = (kernel, tile, made)
    assert made.stack == 0, where
    assert made.shared <= 227 << 10, where
    if tensor_cores:
        assert made.hgmma > 0 and made.hmma == 0, where
    if tile is not None:
        assert made.ldgsts > 0, where
        assert made.copy_bits == 128, where


@pytest.mark.parametrize(
    ("dtype", "block", "kernels"),
    [
        (BF16, (128, 128), {"forward, gelu", "dX of 3", "dW", "score"}),
        (BF16, (64, 64), {"dW"}),
        (BF16, (16, 16), {"forward", "dW"}),
        (FP32, (128, 128), {"dW", "score"}),
    ],
)
def test_the_largest_tiles(dtype, block, kernels):
    left = set(kernels)
    for kernel, tile, call in calls(block, dtype):
        if kernel in left:
            left.remove(kernel)
            check(kernel, tile, call, tensor_cores=dtype == BF16)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (32, 32), (16, 16), (16, 128), (128, 16)])
def test_every_tile(dtype, block):
    for kernel, tile, call in calls(block, dtype):
        check(kernel, tile, call, tensor_cores=dtype != FP32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_kernels_without_products(dtype):
    for kernel, tile, call in element_wise(dtype):
        check(kernel, tile, call, tensor_cores=False)


def test_the_record_is_of_the_shipped_tiles():
    record = json.loads(RECORD.read_text())
    found = {Tile(**row["tile"]) for row in record["compiled"] if row["tile"] is not None}
    assert found == {*HALF, *SINGLE, *SINGLE_TALL}
    assert all(row["stack"] == 0 for row in record["compiled"])
    dense, shape = (3072, 768), LAYERS[3072, 768][0.75]
    fresh = model(shape, dense, 128, 0.75)
    assert fresh in record["predicted"]
