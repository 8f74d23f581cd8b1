"""The command itself: its own process, its messages and exit codes, and being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_gpt.data.shards import open_data, verify
from sparse_gpt.errors import UserError
from tests.data.fixtures import make_folder, prose

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "launch" / "prepare_data.py")]


def _run(*arguments, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [json.dumps({"body": prose(seed, 200)}) for seed in range(50)]
    path.write_text("\n".join(rows))
    return path


def test_files(texts, tmp_path):
    result = _run(
        *("--input", texts, "--text-field", "body", "--out", "made", "--workers", 2),
        *("--tokenizer", "bpe", "--vocab-size", 300, "--val-documents", 4),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    verify(tmp_path / "made")
    data = open_data(tmp_path / "made")
    assert data.split("val").n_documents == 4
    assert data.tokenizer_sha256 in result.stdout
    assert f"{data.split('train').n_tokens:,}" in result.stdout
    sampling = next(line for line in result.stderr.splitlines() if "sampling" in line)
    assert "sampling train for the tokenizer: done" in sampling and "46 documents" in sampling
    assert "tokenising: done" in result.stderr and "\x1b[" not in result.stderr


def test_embedded_default(tmp_path):
    result = _run(
        *("--out", "made", "--max-bytes", 300_000, "--tokenizer", "bytes", "--workers", 1),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    data = open_data(tmp_path / "made")
    assert data.vocab_size == 257
    assert min(data.split("train").n_documents, data.split("val").n_documents) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere"], "error: --input nowhere does not exist"),
        (["--input", "in.jsonl"], "has no field 'text'; it has: body; set --text-field"),
        (["--split-map", "train=x"], "error: --split-map goes with --dataset"),
        (["--wikitext", "raw"], "error: --wikitext goes with"),
        (["--val-fraction", "2"], "error: --val-fraction is 2.0"),
        (["--tokenizer", "nonesuch"], "error: --tokenizer nonesuch is neither"),
    ],
)
def test_errors_are_one_line(texts, tmp_path, arguments, message):
    result = _run(*arguments, "--out", "made", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "made" / "index.json").exists()


def test_wikitext_mirror(hub, tmp_path):
    result = _run(
        *("--dataset", hub / "Salesforce" / "wikitext", "--config", "wikitext-103-v1"),
        *("--split-map", "train=validation,test=test", "--val-fraction", 0.2),
        *("--wikitext", "detokenised", "--tokenizer", "bytes", "--out", "made"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    data = open_data(tmp_path / "made")
    assert data.split("test").n_words == 241_211
    assert data.split("train").n_documents + data.split("val").n_documents == 60
    index = json.loads((tmp_path / "made" / "index.json").read_text())
    assert index["source"]["test"]["wikitext"] == "detokenised"
    missing = _run(
        *("--dataset", hub / "Salesforce" / "wikitext", "--config", "wikitext-103-v1"),
        *("--out", "other"),
        cwd=tmp_path,
    )
    assert missing.returncode == 2
    assert "has no train split but: validation, test" in missing.stderr


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_killed_in_the_middle(tmp_path):
    text = prose(0, 50_000)
    for number in range(100):
        os.link(_once(tmp_path / "one.txt", text), tmp_path / f"{number}.txt")
    (tmp_path / "one.txt").unlink()
    beside = tmp_path.parent / f"{tmp_path.name}-beside"
    out = make_folder(beside / "out", {"train": [[1, 2, 3]]})
    arguments = ["--input", tmp_path, "--out", out, "--tokenizer", "bytes", "--workers", "2"]
    command = [*COMMAND, *map(str, arguments), "--overwrite"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        shards = list(beside.glob("out.tmp-*/train-00000.bin"))
        if shards and shards[0].stat().st_size > 100_000:
            break
        time.sleep(0.01)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2
    verify(out)
    assert open_data(out).split("train").n_tokens == 4
    (unfinished,) = beside.glob("out.tmp-*")
    with pytest.raises(UserError, match=r"has no index\.json"):
        open_data(unfinished)
    while any(map(_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, children))
    again = _run("--input", tmp_path / "none", "--out", out, "--overwrite", cwd=tmp_path)
    assert again.returncode == 2
    assert os.listdir(beside) == ["out"]
    verify(out)


def _once(path: Path, text: str) -> Path:
    if not path.exists():
        path.write_text(text)
    return path


def _load_command():
    import importlib.util

    spec = importlib.util.spec_from_file_location("prepare_data_command", COMMAND[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_split_map():
    split_map = _load_command().split_map
    everything = ["train", "validation", "test", "extra"]
    assert split_map(None, everything) == {"train": "train", "val": "validation", "test": "test"}
    assert split_map(None, ["train"]) == {"train": "train"}
    assert split_map("train=validation,x=extra", everything) == {
        "train": "validation",
        "x": "extra",
    }
    for bad in ("train", "train=", "=x", "train=a,,val=b"):
        with pytest.raises(UserError, match="not of the form"):
            split_map(bad, everything)
    with pytest.raises(UserError, match="names a split twice"):
        split_map("train=a,train=b", everything)
