"""The demo's folder: emptied only where an earlier demo made it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sparse_gpt.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "launch/demo.py"


@pytest.fixture(scope="module")
def claim():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", list(sys.path))  # the script adds its root
        spec = importlib.util.spec_from_file_location("launch_demo", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "launch_demo", module)  # its dataclass asks
        spec.loader.exec_module(module)
        yield module.claim


def test_a_new_or_empty_folder_is_taken(claim, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new/deep", tmp_path / "empty"):
        claim(folder)
        assert [entry.name for entry in folder.iterdir()] == [".made_by_demo"]


def test_an_earlier_demo_is_replaced(claim, tmp_path):
    claim(tmp_path / "demo")
    (tmp_path / "demo/run").mkdir()
    (tmp_path / "demo/run/old").touch()
    claim(tmp_path / "demo")
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == [".made_by_demo"]


def test_any_other_folder_is_left_alone(claim, tmp_path):
    theirs = tmp_path / "thesis"
    (theirs / "chapters").mkdir(parents=True)
    (theirs / "chapters/one.txt").write_text("kept")
    for _ in range(2):  # a refusal must not leave a marker either
        with pytest.raises(UserError, match=r"--folder .*thesis holds something else"):
            claim(theirs)
    assert (theirs / "chapters/one.txt").read_text() == "kept"
    assert [entry.name for entry in theirs.iterdir()] == ["chapters"]
