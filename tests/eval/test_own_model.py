"""Folders of our own model class are scored as the GPT-2 folder of the same function is."""

from pathlib import Path

import pytest

from eval import leaderboard_tasks, perplexity
from eval.leaderboard_run import evaluate_folders
from eval.model_folder import open_folders
from eval.text_source import Text, local_text
from tests.eval.conftest import sentence

pytestmark = [
    # As in test_leaderboard.py: no fork is used here.
    pytest.mark.filterwarnings(
        "ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"
    ),
]


def test_leaderboard(tiny_model: Path, own_folder: Path, tiny_hub: Path) -> None:
    chosen = leaderboard_tasks.select(["winogrande", "truthfulqa"])
    stock, ours = evaluate_folders(
        open_folders([str(tiny_model), str(own_folder)]), chosen, shots="zero", mirror=tiny_hub,
        limit=5, device="cpu",
    )  # fmt: skip
    assert ours["model"]["model_type"] == "sparse_gpt"
    assert ours["model"]["max_length"] == stock["model"]["max_length"]
    for key, column in stock["tasks"].items():
        assert ours["tasks"][key]["documents"] == column["documents"]
        assert ours["tasks"][key]["score"] == pytest.approx(column["score"], abs=1e-6)


def test_perplexity(tiny_model: Path, own_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(sentence, range(40))))
    text = Text("text", local_text([file], "text"))
    stock, ours = (
        perplexity.evaluate_folder(folder, text, device="cpu")
        for folder in open_folders([str(tiny_model), str(own_folder)])
    )
    assert ours["perplexity"]["token_perplexity"] == pytest.approx(
        stock["perplexity"]["token_perplexity"], rel=1e-5
    )
