"""What every test gets: CPU accelerator, no network, optional data, a check that nothing stays.

Tests with real ranks use `tests.ranks.run_ranks`, tests of the `deepspeed` command
`tests.launcher`. Tests on real data ask for the fixture `data_dir`, `novels` or `hub` and are
skipped, and counted at the end, where that data is absent.
"""

import os
import signal

# Before anything imports torch or deepspeed.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import Leftovers, refuse_network
from tests.ranks import close_pools

ROOT = Path(__file__).resolve().parent.parent
NEEDS_DATA = "needs SPARSE_GPT_DATA"

refuse_network()
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So it is in the background of a script, and of all that is started there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    # Under nohup tests still outlive a terminal, but what they start begins as if without it.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
_leftovers = Leftovers()


def _data(part: str) -> Path:
    folder = Path(os.environ.get("SPARSE_GPT_DATA", ROOT.parent / "shared" / "data")) / part
    if not folder.is_dir():
        pytest.skip(f"{NEEDS_DATA}: {folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: $SPARSE_GPT_DATA, else ../shared/data beside the repository."""
    return _data("")


@pytest.fixture(scope="session")
def novels() -> Path:
    """A folder of English novels as .txt files."""
    return _data("novels")


@pytest.fixture(scope="session")
def hub() -> Path:
    """A mirror of Hugging Face data sets, `<org>/<name>` each."""
    return _data("hub")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield  # other plugins' and the fixtures' own teardown first
    close_pools()
    if _leftovers.end() and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    missing = sum("SPARSE_GPT_DATA" in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(
        f"{missing} tests skipped for missing data (SPARSE_GPT_DATA)", yellow=missing > 0
    )
    for line in _leftovers.found:
        terminalreporter.write_line(f"left behind by the tests: {line}", red=True)
