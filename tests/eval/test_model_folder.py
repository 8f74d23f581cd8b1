"""What a model folder must hold, and the names folders get."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.model_folder import check_tokenizer, open_folders
from sparse_gpt.errors import UserError


def fake(folder: Path, *, config: str = '{"vocab_size": 8}', leave_out: str = "") -> Path:
    """The files that are looked for, without a model in them."""
    folder.mkdir(parents=True)
    files = {"config.json": config, "model.safetensors": "", "tokenizer.json": "{}"}
    for name, content in files.items():
        if name != leave_out:
            (folder / name).write_text(content)
    return folder


def test_names_are_the_shortest_ends_that_differ(tmp_path: Path) -> None:
    dense, sparse = fake(tmp_path / "dense/hf"), fake(tmp_path / "sparse/hf")
    assert [folder.name for folder in open_folders([str(dense)])] == ["hf"]
    both = open_folders([str(dense), str(sparse)])
    assert [folder.name for folder in both] == ["dense/hf", "sparse/hf"]
    assert [folder.file_name for folder in both] == ["dense-hf", "sparse-hf"]
    (named,) = open_folders([f"Sparse Wide 75 %={sparse}"])
    assert (named.name, named.file_name) == ("Sparse Wide 75 %", "Sparse-Wide-75")
    equals = fake(tmp_path / "lr=3e-4")
    assert open_folders([str(equals)])[0].name == "lr=3e-4"


def test_a_result_says_where_the_model_comes_from(tmp_path: Path) -> None:
    folder = fake(tmp_path / "m")
    (plain,) = open_folders([str(folder)])
    assert plain.describe()["sparse_gpt"] is None
    before = plain.describe()["config_sha256"]
    (folder / "config.json").write_text('{"vocab_size": 9}')
    (folder / "sparse_gpt.json").write_text(json.dumps({"step": 7}))
    (changed,) = open_folders([str(folder)])
    assert changed.describe()["sparse_gpt"] == {"step": 7}
    assert changed.describe()["config_sha256"] != before and len(before) == 64


def test_bad_folders_are_named(tmp_path: Path) -> None:
    pickled = fake(tmp_path / "pickled", leave_out="model.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    good = fake(tmp_path / "good")
    cases = [
        ([tmp_path / "nowhere"], "model folder not found"),
        ([fake(tmp_path / "a", leave_out="config.json")], "has no config.json .*export_hf.py"),
        ([fake(tmp_path / "b", config="{")], "cannot read .*config.json"),
        ([fake(tmp_path / "c", config="[]")], "expected a JSON object, got list"),
        ([fake(tmp_path / "d", leave_out="tokenizer.json")], "has no tokenizer: .*tokenizer.json"),
        ([pickled], "has no weights: .*pytorch_model.bin is a pickle"),
        ([good, good], "given twice"),
        ([f"x={good}", f"x={fake(tmp_path / 'e')}"], "two model folders are named 'x'"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            open_folders([str(argument) for argument in arguments])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    (folder,) = open_folders([str(fake(tmp_path / "m"))])

    def tokenizer(largest: int, pad: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(get_vocab=lambda: {"a": 0, "b": largest}, pad_token_id=pad)

    check_tokenizer(folder, tokenizer(7))
    check_tokenizer(folder, tokenizer(8, pad=8))
    with pytest.raises(UserError, match=r"ids up to 8, vocab_size in config.json is 8"):
        check_tokenizer(folder, tokenizer(8))
