from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher import run_deepspeed
from tests.multi_node.network import Network, two_nodes
from tests.multi_node.runs import NODES, SCRIPT, write_config
from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """Two nodes, in namespaces of their own if those can be made."""
    with two_nodes() as network:
        yield network


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 120, 10)


@pytest.fixture(scope="session")
def one_node(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The run folder of the same training by as many ranks on one node."""
    folder = tmp_path_factory.mktemp("one_node")
    result = run_deepspeed(SCRIPT, [write_config(folder, corpus)], NODES)
    assert result.returncode == 0, result.stdout
    return folder / "run"
