"""Building C++ kernels: the cache, and what is said where they cannot be built."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_gpt import native

SOURCE = 'extern "C" int answer(int x) { return x + 41; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_GPT_NATIVE", raising=False)
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    native.library.cache_clear()
    yield path
    native.library.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)


@needs_compiler
def test_it_is_built_once_and_again_where_the_source_differs(source, monkeypatch):
    library = native.library(source)
    assert library is not None
    assert library.answer(1) == 42
    compiled = []
    compile_ = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: (compiled.append(a), compile_(*a)))
    first = native.build(source)
    assert not compiled
    source.write_text(SOURCE.replace("41", "1"))
    assert native.build(source) != first
    assert len(compiled) == 1
    kept = {path.suffix for path in first.parent.iterdir()}
    assert kept == {".so", ".lock"}, "nothing half-made stays"
    assert first.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_processes_that_start_together_build_one(source):
    code = (
        "import sys; from pathlib import Path; from sparse_gpt import native\n"
        "def spy(*a, of=native._compile): print('compiled'); of(*a)\n"
        "native._compile = spy\n"
        "assert native.library(Path(sys.argv[1])).answer(0) == 41\n"
    )
    root = Path(native.__file__).parents[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert "".join(said).count("compiled") == 1


def none_and_said(source, caplog) -> str:
    with caplog.at_level(logging.WARNING):
        assert native.library(source) is None
        assert native.library(source) is None
    assert len(caplog.records) == 1, "said once"
    return caplog.records[0].getMessage()


def test_no_compiler(source, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler (c++, g++, clang++) on PATH" in none_and_said(source, caplog)


def test_a_compiler_of_ones_own_that_is_not_there(source, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "/nowhere/c++" in none_and_said(source, caplog)


@needs_compiler
def test_a_source_that_does_not_compile(source, caplog):
    source.write_text("int main( {")
    assert "failed: " in none_and_said(source, caplog)


@needs_compiler
def test_a_cache_that_cannot_be_made(source, monkeypatch, caplog):
    monkeypatch.setenv("SPARSE_GPT_CACHE", "/proc/none")
    assert "$SPARSE_GPT_CACHE" in none_and_said(source, caplog)


@needs_compiler
def test_nothing_is_loaded_from_where_others_may_write(source, tmp_path, caplog):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others may write into it" in none_and_said(source, caplog)


def test_switched_off(source, monkeypatch, caplog):
    monkeypatch.setenv("SPARSE_GPT_NATIVE", "0")
    assert native.library(source) is None
    assert not caplog.records


@needs_compiler
def test_a_damaged_library_is_said(source, caplog):
    native.build(source).write_bytes(b"junk")
    assert "answer.cpp" in none_and_said(source, caplog)


@needs_compiler
def test_nobody_at_home(source, monkeypatch, caplog):
    monkeypatch.delenv("SPARSE_GPT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert "home directory" in none_and_said(source, caplog)
