"""JSON with two meanings, without end or without measure, in every file that is read as such."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.model_folder import open_folders
from eval.report import read_result
from eval.run_folder import RunFolder
from sparse_gpt.compare import read_run
from sparse_gpt.config import LoggingConfig
from sparse_gpt.data.shards import open_data
from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.experiment.corpora import _read_stamp
from sparse_gpt.experiment.leaderboard_record import read_scores
from sparse_gpt.experiment.record import Records, read_json, read_log
from sparse_gpt.experiment.runner import tail
from sparse_gpt.experiment.sessions import Sessions
from sparse_gpt.experiment.special_plots import speeds
from sparse_gpt.finetune.grid import _read_done
from sparse_gpt.hf import ImportedWeights
from sparse_gpt.hf.stock import stock_model, stock_tokenizer
from sparse_gpt.train.checkpoint_files import open_checkpoint
from sparse_gpt.train.metrics import Metrics
from sparse_gpt.train.results import read_results


def _open_grid(folder: Path) -> Any:
    (folder / "lr-0.1").mkdir()
    return open_checkpoint(folder)


# What reads it: the file below a folder, and the reader given that folder.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "index": ("index.json", open_data),
    "manifest": ("manifest.json", open_checkpoint),
    "imported config": ("config.json", ImportedWeights),
    "stock config": ("config.json", stock_model),
    "stock tokenizer": ("tokenizer_config.json", stock_tokenizer),
    "evaluated config": ("config.json", lambda folder: open_folders([str(folder)])),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "record": ("runs/a.json", lambda folder: Records(folder).read("a")),
    "environment": ("environment.json", lambda folder: read_json(folder / "environment.json")),
    "results": ("results.json", lambda folder: read_results(folder / "results.json")),
    "chosen run": ("results.json", _open_grid),
    "sessions": ("sessions.json", Sessions),
    "speeds": ("speeds.json", lambda folder: speeds(folder / "speeds.json")),
    "log": ("metrics.jsonl", read_run),
    "evaluation": ("e.json", lambda folder: read_result(folder / "e.json")),
    "scores": ("e.json", lambda folder: read_scores(folder / "e.json")),
}
BAD = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "cut": b'{"a": ',
    "no utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "nul": b"\0" * 100,
    "number": b"3",
    "list": b"[3]",
    "text": b'"a"',
    "null": b"null",
    "empty": b"",
    "code": b"__import__('os').mkdir('MARKER')",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_json_object(tmp_path, marker, refused, reader, kind) -> None:
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(BAD[kind].replace(b"MARKER", str(marker).encode()))
    with refused(Path(name).name, mb=48):
        read(tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_enormous_files(tmp_path, refused, reader) -> None:
    """A terabyte on the disk's account, nothing of which is read."""
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)
    with refused(Path(name).name, mb=48):
        read(tmp_path)


@pytest.mark.parametrize(
    "reader",
    ["index", "manifest", "record", "results", "chosen run", "evaluation", "scores", "log"],
)
def test_keys_given_twice(tmp_path, refused, reader) -> None:
    """In files of our own, of which one program might take the first and another the last."""
    name, read = READERS[reader]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"format": 3, "schema": 1, "format": 4}')
    with refused(name.split("/")[-1], "key 'format' is given twice"):
        read(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in (*BAD, "enormous") if kind != "empty"])
def test_logs_that_records_are_made_of(tmp_path, refused, kind) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(BAD.get(kind, b""))
    if kind == "enormous":
        os.truncate(path, 1 << 40)
    with refused(path, "line 1", "remove the run's folder", mb=8):
        list(read_log(path))


def test_long_logs_are_read_a_line_at_a_time(tmp_path) -> None:
    """100 MB of lines, each as long as a line may nearly be."""
    filler, path = "x" * 10**6, tmp_path / "metrics.jsonl"
    score = {"kind": "validation", "step": 1, "tokens": 1, "flops_spent": 1, "loss": 2}
    with open(path, "w") as file:
        for step in range(100):
            line = {"kind": "train", "step": step, "sparsity": 0.5, "filler": filler}
            file.write(json.dumps(line) + "\n" + json.dumps({**score, "step": step}) + "\n")
    log = Metrics(tmp_path, LoggingConfig(), "name", 100, True)
    tracemalloc.start()
    try:
        assert read_run(tmp_path).losses == [2.0] * 100
        assert sum(line["kind"] == "train" for line in read_log(path)) == 100
        log.start(90)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        log.close()
    assert peak < 16 << 20
    assert [line["step"] for line in read_log(path)] == [step for s in range(91) for step in (s, s)]


def test_of_a_log_without_measure_its_end_is_shown(tmp_path) -> None:
    log = tmp_path / "log.txt"
    log.touch()
    os.truncate(log, 1 << 40)
    with open(log, "ab") as file:
        file.write(b"\nthe last\nwords\n")
    assert tail(log).endswith("\nthe last\nwords")


@pytest.mark.parametrize("kind", [*BAD, "enormous"])
def test_a_stamp_that_is_none_is_made_again(tmp_path, kind) -> None:
    path = tmp_path / "corpus.json"
    path.write_bytes(BAD.get(kind, b""))
    if kind == "enormous":
        os.truncate(path, 1 << 40)
    assert _read_stamp(path) == {}


def test_a_grid_of_learning_rates(tmp_path, refused) -> None:
    path = tmp_path / "results.json"
    for kind in ("deep", "digits", "no utf-8", "empty"):
        path.write_bytes(BAD[kind])
        with refused("move it away"):
            _read_done(path, "x")


class _Folder:
    file_name = "model"


def test_records_of_the_leaderboard(tmp_path, refused) -> None:
    folder = RunFolder(tmp_path, _Folder(), {"settings": 1})  # type: ignore[arg-type]
    path = folder.path / "arc_challenge.json"
    for content in BAD.values():
        path.write_bytes(content)
        with refused(path):
            folder.read("arc_challenge", "data")
    path.write_text(json.dumps({"run_sha256": folder.sha256}))
    with refused(path, "no record of a task"):
        folder.read("arc_challenge", "data")
    (folder.path / "run.json").write_text('{"model": 3}')
    with refused(folder.path / "run.json"):
        folder.model()


RESULT = {
    "kind": "perplexity",
    "schema": 1,
    "model": {"name": "m"},
    "settings": {"text": "t", "max_length": 8, "stride": 4},
    "perplexity": {"tokens": 5, "token_perplexity": 2.0, "word_perplexity": 3.0,
                   "bits_per_byte": 1.0},
    "notes": ["n"],
}  # fmt: skip


@pytest.mark.parametrize("place", ["model", "settings", "perplexity", "notes", "kind"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {}, {"name": 3}])
def test_results_of_evaluations(tmp_path, refused, place, value) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps(RESULT))
    assert read_result(path) == RESULT
    if (place, value) == ("notes", []):
        return
    path.write_text(json.dumps({**RESULT, place: value}))
    with refused(path):
        read_result(path)


@pytest.mark.parametrize("line", ['{"kind": "train"}', "3", "[]", '{"kind": []}', '{"step": "x"}'])
def test_logs_of_runs(tmp_path, refused, line) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with refused(tmp_path / "metrics.jsonl"):
        read_run(tmp_path)


SESSIONS = ["{}", "[3]", "[[1]]", '[["1", "2"]]', "[[1, 1e300]]", "[[-1, 2]]", "[[1, null]]"]


@pytest.mark.parametrize("text", SESSIONS)
def test_sessions(tmp_path, refused, text) -> None:
    (tmp_path / "sessions.json").write_text(text)
    with refused(tmp_path / "sessions.json"):
        Sessions(tmp_path)
