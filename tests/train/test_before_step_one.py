"""Mistakes that would show late are refused before the first step, and nothing is saved."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train import checkpoint
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=1))


@pytest.fixture(scope="module")
def without_val(corpus, tmp_path_factory):
    """The same corpus, prepared without a held-out split."""
    copy = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("corpus") / "no_val"))
    index = json.loads((copy / "index.json").read_text())
    del index["splits"]["val"]
    (copy / "index.json").write_text(json.dumps(index))
    return str(copy)


def attempt(corpus, out, changes, free_bytes=None):
    """(steps made, what a `UserError` said) of a run, on a disk with that much room."""
    steps, said = [], ""
    usage = shutil.disk_usage if free_bytes is None else lambda _: Usage(10**12, 0, free_bytes)
    with mock.patch.object(checkpoint.shutil, "disk_usage", usage):
        try:
            with trainer(run_config(corpus, out, **changes)) as made:
                after_every_step(made, lambda step, health, update: steps.append(step))
                made.fit()
        except UserError as problem:
            said = str(problem)
    return steps, said


def refused(corpus, out, changes, free_bytes=None, ranks=1):
    outcomes = run_ranks(ranks, attempt, corpus, str(out), changes, free_bytes)
    assert not list(out.glob("checkpoints/step-*"))
    for steps, said in outcomes:
        assert steps == []
        assert said, "it was not refused"
    return [said for _, said in outcomes]


def test_what_these_tests_vary_runs_otherwise(corpus, without_val, tmp_path):
    for number, data in enumerate((corpus, without_val)):
        out = str(tmp_path / f"run{number}")
        assert run_ranks(1, attempt, data, out, {"max_steps": 3}, 10**9) == [([1, 2, 3], "")]


def test_a_validation_split_shorter_than_a_sequence(corpus, tmp_path):
    for changes in ({}, {"evaluation__every": 5}):
        said = refused(corpus, tmp_path / "run", {"seq_len": 1024, **changes})[0]
        assert "split 'val'" in said and "seq_len 1024" in said and "lower seq_len" in said


def test_too_little_disk(corpus, tmp_path):
    said = refused(corpus, tmp_path / "run", {"max_steps": 3}, 1000)[0]
    assert "3 more checkpoints need" in said and "checkpoint.keep_last" in said
    said = refused(corpus, tmp_path / "run", {"max_steps": 3, "evaluation__patience": 1}, 1000)[0]
    assert "5 more checkpoints need" in said  # the best one, and the next best in the making


@pytest.mark.parametrize("key", ["every", "patience"])
def test_validations_without_a_validation_split(without_val, tmp_path, key):
    said = refused(without_val, tmp_path / "run", {f"evaluation__{key}": 2})[0]
    assert "no val split" in said and "--val-fraction" in said


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"warmup_steps": 13}, "13 warmup steps and 0 decay steps are more than the 12 steps"),
        ({"warmup_tokens": 13 * 8 * 32}, "13 warmup steps"),
        (
            {"type": "wsd", "warmup_steps": 7, "decay_fraction": 0.5},
            "7 warmup steps and 6 decay steps",
        ),
    ],
)
def test_a_schedule_longer_than_the_run(corpus, tmp_path, schedule, said):
    assert said in refused(corpus, tmp_path / "run", {"schedule": schedule})[0]


def test_an_output_dir_that_is_a_file_is_refused_on_every_rank(corpus, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        for said in refused(corpus, out, {}, ranks=2):
            assert said.startswith("output_dir: ") and str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "kept"
