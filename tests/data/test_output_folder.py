"""Where prepared data goes: complete or not at all, and never over anything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_gpt.data import output_folder
from sparse_gpt.data.output_folder import building
from sparse_gpt.data.shards import open_data, verify
from sparse_gpt.errors import UserError
from tests.data.fixtures import make_folder

OLD, NEW = {"train": [[1, 2, 3]]}, {"train": [[4, 5]]}


def _tokens(folder: Path) -> list[int]:
    split = open_data(folder).split("train")
    return split.read(0, split.n_tokens).tolist()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _build(out: Path, *, overwrite: bool = False) -> None:
    with building(out, overwrite=overwrite) as folder:
        make_folder(folder, NEW)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def dead() -> str:
    """Host and number of a process that ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{output_folder._host()}-{process.pid}"


def test_new_empty_and_nested(out, tmp_path):
    _build(out)
    assert _tokens(out) == [4, 5, 256]
    (tmp_path / "empty").mkdir()
    _build(tmp_path / "empty")
    verify(tmp_path / "empty")
    _build(tmp_path / "a" / "b")
    assert _names(tmp_path) == ["a", "data", "empty"] and _names(tmp_path / "a") == ["b"]


def test_old_data_is_whole_until_the_exchange(out, tmp_path):
    make_folder(out, OLD)
    with pytest.raises(UserError, match="add --overwrite"):
        _build(out)
    with building(out, overwrite=True) as folder:
        assert folder.parent == tmp_path and _names(folder) == []
        make_folder(folder, NEW)
        assert _tokens(out) == [1, 2, 3, 256]
    assert _tokens(out) == [4, 5, 256]
    assert _names(tmp_path) == ["data"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_changes_nothing(out, tmp_path, error):
    make_folder(out, OLD)

    def build() -> None:
        with building(out, overwrite=True) as folder:
            make_folder(folder, NEW)
            raise error

    with pytest.raises(error):
        build()
    assert _tokens(out) == [1, 2, 3, 256]
    assert _names(tmp_path) == ["data"]


def test_a_failing_exchange_puts_the_old_data_back(out, tmp_path, monkeypatch):
    make_folder(out, OLD)
    rename = Path.rename

    def fail(self, target):
        if ".tmp-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        _build(out, overwrite=True)
    assert _tokens(out) == [1, 2, 3, 256]
    assert _names(tmp_path) == ["data"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "train-00000.bin", "tokenizer/tokenizer.json"])
def test_folders_that_hold_no_prepared_data(out, tmp_path, name, overwrite):
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    for index in (None, "[]", "{", json.dumps({"format": "of something else"})):
        if index is not None:
            (out / "index.json").write_text(index)
        with pytest.raises(UserError, match=r"no index\.json of prepared data"):
            _build(out, overwrite=overwrite)
        assert (out / name).read_text() == "precious"
    assert _names(tmp_path) == ["data"]


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/mine.json", "more/x", "val-00000.bin/x"])
def test_other_files_beside_prepared_data(out, name):
    make_folder(out, OLD)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    with pytest.raises(UserError, match="which --overwrite would delete"):
        _build(out, overwrite=True)
    assert (out / name).read_text() == "precious"
    assert _tokens(out) == [1, 2, 3, 256]


def test_data_of_another_version_can_be_replaced(out):
    make_folder(out, OLD)
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "version": 2}))
    _build(out, overwrite=True)
    assert _tokens(out) == [4, 5, 256]


def test_what_appears_meanwhile_is_not_replaced(out, tmp_path):
    def build() -> None:
        with building(out, overwrite=False) as folder:
            make_folder(folder, NEW)
            make_folder(out, OLD)

    with pytest.raises(UserError, match="holds prepared data; add --overwrite"):
        build()
    assert _tokens(out) == [1, 2, 3, 256]
    assert _names(tmp_path) == ["data"]


def test_no_folder(out, monkeypatch):
    out.write_text("x")
    with pytest.raises(UserError, match="data is not a folder"):
        _build(out)
    with pytest.raises(UserError, match="data is a file, not a folder"):
        _build(out / "inner")
    out.unlink()
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(UserError, match="where a disk is mounted"):
        _build(out)


def test_a_link_stays_and_its_target_is_replaced(out, tmp_path):
    disk = tmp_path / "disk"
    make_folder(disk / "real", OLD)
    out.symlink_to(disk / "real")
    _build(out, overwrite=True)
    assert out.is_symlink() and _tokens(out) == [4, 5, 256]
    assert _names(disk) == ["real"]


def test_remains_of_dead_preparations_go(out, tmp_path, dead):
    make_folder(out, OLD)
    make_folder(tmp_path / f"data.tmp-{dead}", NEW)
    make_folder(tmp_path / f"data.old-{dead}", NEW)
    (tmp_path / f"data.tmp-{output_folder._host()}-{os.getpid()}").mkdir()  # a number used again
    with pytest.raises(UserError, match="add --overwrite"):
        _build(out)
    assert _names(tmp_path) == ["data"]
    assert _tokens(out) == [1, 2, 3, 256]


def test_killed_between_the_two_renames(out, tmp_path, dead, capsys):
    make_folder(tmp_path / f"data.old-{dead}", OLD)
    make_folder(tmp_path / f"data.tmp-{dead}", NEW)
    with pytest.raises(UserError, match="add --overwrite"):
        _build(out)
    assert _tokens(out) == [1, 2, 3, 256]
    assert _names(tmp_path) == ["data"]
    assert "put back" in capsys.readouterr().err


def test_remains_that_may_be_in_use_or_are_not_ours_stay(out, tmp_path, dead, capsys):
    host = output_folder._host()
    kept = [
        f"data.tmp-{host}-{os.getppid()}",  # runs
        "data.tmp-elsewhere-123",
        f"data.tmp-{dead}",  # with a file of the user
        f"data2.tmp-{dead}",  # of another folder
        "data.old",
        "data.tmp-x",
    ]
    for name in kept:
        make_folder(tmp_path / name, NEW)
    (tmp_path / f"data.tmp-{dead}" / "thesis.txt").write_text("precious")
    _build(out)
    assert _names(tmp_path) == sorted(["data", *kept])
    (note,) = capsys.readouterr().err.splitlines()
    assert "data.tmp-elsewhere-123 was left by, or is in use by, a preparation on elsewhere" in note
