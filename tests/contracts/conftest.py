from pathlib import Path

import pytest

from tests.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small corpus as byte-tokenised shards; a path as text."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    return str(write_corpus(folder / "tiny", documents=120, val_documents=10))
