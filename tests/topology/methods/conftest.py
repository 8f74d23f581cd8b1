import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller asks how many ranks there are; no process group is started here."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
