"""The corpus of the tests with faults, and their counts at the end of the session."""

import pytest

from tests.faults import tally
from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=120, val_documents=6))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in tally.lines():
        terminalreporter.write_line(f"faults: {line}")
