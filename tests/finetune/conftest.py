from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.finetune.runs import pretrain
from tests.ranks import run_ranks
from tests.tiny import write_corpus

SPARSE = {"max_steps": 8, "micro_batch_size": 4, "evaluation__sequences": None}


@dataclass(frozen=True)
class Pretrained:
    """A run at 75 % sparsity, SET, and its validation loss over the whole split."""

    run: Path
    loss: float


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=60, val_documents=4))


@pytest.fixture(scope="session")
def pretrained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    return Pretrained(run, run_ranks(1, pretrain, corpus, str(run), SPARSE)[0])
