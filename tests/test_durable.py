"""Names and files on the disk."""

import os

import pytest

from sparse_gpt.durable import exchange, make_folder


def test_two_folders_exchange_their_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]


def test_an_exchange_with_nothing_is_an_error_and_changes_nothing(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "a", tmp_path / "b")
    assert caught.value.filename == str(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_and_those_above_it_are_made_once(tmp_path):
    for _ in range(2):
        make_folder(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file/b")
