"""C++ kernels for CPUs: built on first use, kept in a cache, called through ctypes.

A source file exports plain C functions and includes nothing of torch, so a build takes seconds
and any torch runs the result. The cache is `$SPARSE_GPT_CACHE`, or `sparse_gpt` in
`$XDG_CACHE_HOME` or `~/.cache`; a file in it is named by all that its bits depend on (source,
headers beside it, compiler, flags, CPU). `SPARSE_GPT_NATIVE=0` switches all of it off.

Who calls `library` has a way without it: it is None where nothing can be built, and says once why.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
if platform.machine() == "x86_64":
    FLAGS += ("-mprefer-vector-width=512",)
BUILD_SECONDS = 300

log = logging.getLogger(__name__)


class BuildError(Exception):
    """Why there is no native library; one line for a log."""


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if chosen := os.environ.get("SPARSE_GPT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse_gpt"


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ source file, built if need be; None where it cannot be."""
    if os.environ.get("SPARSE_GPT_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(source)))
    except (BuildError, OSError) as error:
        log.warning("no native kernels of %s: %s; slower ones run instead", source.name, error)
        return None


def compiler() -> Path:
    """The C++ compiler: `$CXX`, or c++, g++ or clang++ from PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    raise BuildError(f"no C++ compiler ({', '.join(names)}) on PATH")


def build(source: Path) -> Path:
    """Compile a source file, unless the cache has the result. Raises `BuildError`."""
    cxx = compiler()
    try:
        text = b"\0".join(path.read_bytes() for path in [source, *_headers(source)])
        folder = _private(cache_folder() / "native")
        parts = (text, repr((FLAGS, str(cxx), _version(cxx), _cpu())).encode())
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
        target = folder / f"{source.stem}-{digest}.so"
        if not target.exists():
            with _lock(folder / f"{target.stem}.lock"):  # ranks of a machine start together
                if not target.exists():
                    _compile(cxx, source, target)
        return target
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home, too
        raise BuildError(f"cannot build in $SPARSE_GPT_CACHE or ~/.cache: {error}") from error


def _headers(source: Path) -> list[Path]:
    return sorted(source.parent.glob("*.h"))


def _compile(cxx: Path, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [str(cxx), *FLAGS, "-o", str(made), str(source), "-ldl"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{cxx.name} did not end within {BUILD_SECONDS} s") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            raise BuildError(f"{cxx.name} failed: {lines[0]}")
        made.replace(target)  # whole, or not there


def _private(folder: Path) -> Path:
    """The folder, made if need be; libraries are not loaded from where others may write."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{folder} belongs to somebody else, or others may write into it")
    return folder


def _version(cxx: Path) -> str:
    done = subprocess.run([str(cxx), "--version"], capture_output=True, text=True, timeout=60)
    return done.stdout


def _cpu() -> str:
    """What -march=native depends on: homes are shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
