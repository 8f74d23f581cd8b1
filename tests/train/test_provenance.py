"""What a run folder says of the code it ran with."""

import json
import shutil
import subprocess
from pathlib import Path

from sparse_gpt.train import provenance


def git(folder: Path, *arguments: str) -> None:
    named = ["-c", "user.name=x", "-c", "user.email=x@y", "-C", str(folder)]
    subprocess.run(["git", *named, *arguments], check=True, capture_output=True)


def test_code_that_is_not_committed_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "copy/sparse_gpt/train/provenance.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(provenance.__file__, copy)
    root = tmp_path / "copy"
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    monkeypatch.setattr(provenance, "__file__", str(copy))

    def written() -> dict:
        provenance.write_provenance(tmp_path / "run", "name: x\n")
        return json.loads((tmp_path / "run/environment.json").read_text())

    first = written()
    assert len(first["git_revision"]) == 40 and first["uncommitted"] == []
    (root / "docs").mkdir()
    (root / "docs/results.json").write_text("{}")  # results come as runs end
    assert written()["uncommitted"] == []
    copy.write_text("changed\n")
    (root / "launch").mkdir()
    (root / "launch/new.py").write_text("new\n")
    found = written()["uncommitted"]
    assert found == ["sparse_gpt/train/provenance.py", "launch/"]
    assert "changed" in (tmp_path / "run/git.diff").read_text()


def test_outside_of_a_checkout_nothing_is_known(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a/b/c.py"))
    provenance.write_provenance(tmp_path / "run", "name: x\n")
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert (environment["git_revision"], environment["uncommitted"]) == (None, None)
