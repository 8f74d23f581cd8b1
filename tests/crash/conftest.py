"""The corpus and the undisturbed run of the tests with faults."""

import pytest

from tests.crash.runs import RANKS, SCRIPT, write_config
from tests.launcher import run_deepspeed
from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 120, 6)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_deepspeed(SCRIPT, [write_config(folder, tiny)], RANKS)
    assert result.returncode == 0, result.stdout
    return folder / "run"
