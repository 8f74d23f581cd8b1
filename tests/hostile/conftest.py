"""What tests of hostile input share: a marker that no pickle may make, and counts at the end."""

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparse_gpt.errors import UserError

LONGEST_MESSAGE = 2000
_counts: dict[str, int] = {}
_fuzzed: dict[str, dict[str, int]] = {}

Refused = Callable[..., contextlib.AbstractContextManager[None]]


@pytest.fixture
def refused() -> Refused:
    """`with refused(path, "text"):` the block must end with a `UserError` that says all of it.

    In a message that can be shown, with at most `mb` MiB of Python's memory taken on the way.
    """

    @contextlib.contextmanager
    def block(*said: object, mb: float = 32) -> Iterator[None]:
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as caught:
                yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        message = str(caught.value)
        for part in said:
            assert str(part) in message
        assert len(message) <= LONGEST_MESSAGE
        assert peak <= mb * 2**20, f"{peak / 2**20:.0f} MiB"
        _counts["bad inputs"] = _counts.get("bad inputs", 0) + 1

    return block


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a crafted pickle would make, were it ever read; it must not be there afterwards."""
    path = tmp_path / "a-pickle-was-read"
    yield path
    assert not path.exists()


@pytest.fixture
def fuzzed() -> Callable[[dict[str, dict[str, int]]], None]:
    """Count what a run of the fuzzer came to, by reader, for the last lines."""

    def add(counts: dict[str, dict[str, int]]) -> None:
        for reader, numbers in counts.items():
            total = _fuzzed.setdefault(reader, {})
            for key, number in numbers.items():
                total[key] = total.get(key, 0) + number

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _counts:
        terminalreporter.write_line(f"hostile: {_counts['bad inputs']:,} bad inputs refused")
    for reader, numbers in _fuzzed.items():
        said = ", ".join(f"{number:,} {key}" for key, number in numbers.items())
        terminalreporter.write_line(f"hostile: fuzzed {reader}: {said}")
    if _fuzzed:
        total = sum(numbers["cases"] for numbers in _fuzzed.values())
        terminalreporter.write_line(f"hostile: {total:,} fuzz cases in all")
