"""tools/make_venv.sh with a Python that only records what it is asked: nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *version_info\\ \\<*) exit "${FAKE_OLD:-0}" ;;
    *"import ensurepip"*) exit "${FAKE_NO_VENV:-0}" ;;
    "-m venv"*)
        echo "venv" >> "$FAKE_LOG"
        mkdir -p .venv/bin && cp "$FAKE_PYTHON" .venv/bin/python
        exit "${FAKE_VENV:-0}" ;;
    "-m pip"*)
        echo "$*" >> "$FAKE_LOG"
        exit "${FAKE_PIP:-0}" ;;
esac
"""


class Project:
    """A folder with what the installation reads, and a fake Python."""

    def __init__(self, folder: Path):
        self.folder = folder / "project"
        (self.folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", self.folder)
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        shutil.copy(ROOT / "tools/make_venv.sh", self.folder / "tools")
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.python = self.program("python3.99", FAKE_PYTHON)

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `make venv`; what the fake Python was asked meanwhile is in `asked`."""
        self.log.write_text("")
        env = os.environ | {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE_LOG": str(self.log),
            "FAKE_PYTHON": str(self.python),
        }
        for inherited in ("PIP_ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
            env.pop(inherited, None)
        return subprocess.run(
            ["make", "venv", f"PYTHON={self.python}", *arguments],
            cwd=self.folder,
            env=env | environment,
            capture_output=True,
            text=True,
        )

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_installs_once_and_passes_options_to_pip(project):
    first = project.make("PIP_ARGS=--index-url https://example.invalid/simple --pre")
    assert first.returncode == 0, first.stderr
    assert project.asked[0] == "venv"
    assert "--index-url https://example.invalid/simple --pre -e .[dev]" in project.asked[1]
    second = project.make()
    assert (second.returncode, second.stdout, project.asked) == (0, "", [])


def test_changed_dependencies_are_installed_into_the_same_environment(project):
    project.make()
    with (project.folder / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.make().returncode == 0
    assert len(project.asked) == 1 and project.asked[0].startswith("-m pip install")
    assert project.make().stdout == ""


def test_a_touched_pyproject_is_not_a_changed_one(project):
    project.make()
    os.utime(project.folder / "pyproject.toml")
    assert project.make().stdout == ""
    assert project.asked == []


@pytest.mark.parametrize(
    ("step", "message"), [("FAKE_PIP", "pip failed"), ("FAKE_VENV", "-m venv failed")]
)
def test_an_interrupted_installation_starts_over(project, step, message):
    failed = project.make(**{step: "1"})
    assert failed.returncode != 0
    assert message in failed.stderr
    (project.folder / ".venv/half-written").touch()
    again = project.make()
    assert again.returncode == 0
    assert "did not end: starting over" in again.stdout
    assert project.asked[0] == "venv"
    assert not (project.folder / ".venv/half-written").exists()
    assert project.make().stdout == ""


def test_a_moved_folder_is_installed_anew(project):
    project.make()
    project.folder = project.folder.rename(project.folder.with_name("elsewhere"))
    moved = project.make()
    assert moved.returncode == 0
    assert "was moved" in moved.stdout
    assert project.asked[0] == "venv"


def test_an_old_python_is_refused_by_name(project):
    failed = project.make(FAKE_OLD="1")
    assert failed.returncode != 0
    assert f"PYTHON={project.python} is not a Python 3.11 or newer" in failed.stderr
    assert project.asked == []


def test_a_python_that_cannot_make_environments_says_what_to_install(project):
    failed = project.make(FAKE_NO_VENV="1")
    assert failed.returncode != 0
    assert "cannot make virtual environments; install its venv package" in failed.stderr
    assert project.asked == []


@pytest.mark.parametrize(
    ("system", "machine", "message"),
    [
        ("Darwin", "arm64", "this runs on Linux; on Darwin use Docker"),
        ("Linux", "riscv64", "no packages for riscv64"),
    ],
)
def test_other_machines_are_told_what_to_do(project, system, machine, message):
    answer = f'#!/bin/sh\ncase "$1" in -s) echo {system} ;; *) echo {machine} ;; esac\n'
    project.program("uname", answer)
    failed = project.make()
    assert failed.returncode != 0
    assert message in failed.stderr
    assert project.asked == []
