"""Comparing runs: ratios against the first, from the runs' own logs."""

import json

import pytest

from sparse_gpt.compare import compare, read_run
from sparse_gpt.errors import UserError


def write_log(folder, flops, losses, sparsity, updates=0):
    folder.mkdir()
    records = [{"kind": "topology", "step": 1, "churn": 0.1}] * updates
    for i, loss in enumerate(losses, 1):
        records.append({"kind": "train", "step": i, "sparsity": sparsity})
        records.append(
            {
                "kind": "validation",
                "step": i,
                "loss": loss,
                "tokens": 100 * i,
                "flops_spent": flops * i,
            }
        )
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_rows_and_files(tmp_path):
    dense = write_log(tmp_path / "dense", 1000, [5.0, 4.0], 0.0)
    sparse = write_log(tmp_path / "sparse", 1500, [5.0, 3.5], 0.75, updates=3)
    (sparse / "config.yaml").write_text("ift: {member: wide, iso_flop: model}\n")
    table = compare([dense, sparse], tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert rows[1]["flops_ratio"] == 1.5
    assert rows[1]["loss_difference"] == -0.5
    assert rows[1]["topology_updates"] == 3
    assert rows[1]["curve"] == [[100, 1500, 5.0], [200, 3000, 3.5]]
    assert (
        "| sparse | 75.00% | whole run | 200 | 3.0000e+03 | 1.500 | 3 | 3.5000 | -0.5000 |" in table
    )
    assert "| dense | 0.00% | - | 200 |" in table
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "not json\n", '{"kind": "train"}\n'])
def test_no_log(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_run(tmp_path)
