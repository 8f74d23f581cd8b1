"""The benchmark of sparse linear layers: that it runs, and what it compares."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import dense_linear, sparse_linear

ROOT = Path(__file__).resolve().parents[2]


def test_it_runs_and_names_what_it_compared_with(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks/sparse_linear.py"), "--shapes", "tiny"]
    command += ["--blocks", "4x4", "1x1", "masked", "csr", "bsr", "--sparsities", "0.75"]
    command += ["--threads", "1", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert [row["block"] for row in rows] == ["4x4", "1x1", "masked", "csr", "bsr", "4x4", "1x1"]
    assert all(row["ratio"] > 0 for row in rows)
    assert all(0.9 < row["flops_over_dense"] < 1.1 for row in rows[:2])
    # Targets of blocks are of bf16, and of fp32 where bf16 is emulated.
    judged = rows[5] if dense_linear.has_bf16() else rows[0]
    assert judged["target"] == 1.4 and isinstance(judged["reached"], bool)
    assert rows[1]["target"] == 2.1 and rows[6]["target"] is None
    assert {(d["dtype"], len(d["fastest"])) for d in report["dense"]} == {("fp32", 3), ("bf16", 3)}
    assert not report["not_measured"] and out.with_suffix(".png").stat().st_size > 0


def test_wider_layers_keep_the_work():
    for sparsity, expected in ((0.5, (1088, 4352)), (0.75, (1536, 6144)), (0.9, (2432, 9728))):
        assert sparse_linear.wide((768, 3072), sparsity, (16, 16)) == expected
    assert sparse_linear.wide((768, 3072), 0.75, (128, 128)) == (1536, 6144)


def test_setting_aside_one_dnn_is_undone():
    before = torch.backends.mkldnn.enabled
    with dense_linear.allowing_one_dnn(False):
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == before
