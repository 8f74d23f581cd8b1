"""What one rank alone cannot read is an error on all of them: none waits for it."""

from unittest import mock

import pytest
import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.finetune import spdf
from sparse_gpt.train.checkpoint_files import CheckpointReader
from tests.finetune.runs import results_of
from tests.ranks import run_ranks


def unreadable_on_rank_1(corpus, out, checkpoint, what, mode):
    inner = getattr(CheckpointReader, what)

    def read(self, *args, **more):
        if dist.get_rank() == 1:
            raise UserError(f"broken checkpoint: no {what}")
        return inner(self, *args, **more)

    with mock.patch.object(CheckpointReader, what, read):
        return results_of(corpus, out, checkpoint, mode)


COMPACT = ["mode=sparse", "storage=compact", "kernel=reference"]


@pytest.mark.parametrize(
    ("what", "mode"),
    [
        ("mask", ["mode=sparse"]),
        ("mask", COMPACT),
        ("parameter", ["mode=dense"]),
        ("parameter", ["mode=dense", "deepspeed.zero_stage=3"]),
        ("verify", ["mode=dense"]),
    ],
    ids=["mask", "compact mask", "parameter", "parameter at stage 3", "digest"],
)
def test_all_ranks_say_it(corpus, pretrained, tmp_path, what, mode):
    args = (corpus, str(tmp_path / "run"), str(pretrained.run), what, mode)
    first, second = run_ranks(2, unreadable_on_rank_1, *args)
    assert first == second
    assert first.startswith(f"broken checkpoint: no {what} (rank 1 on ")


def no_configuration_on_rank_1(corpus, out, checkpoint):
    inner = spdf.read_tree

    def read(*args):
        if dist.get_rank() == 1:
            raise FileNotFoundError(2, "No such file", "finetune.yaml")
        return inner(*args)

    with mock.patch.object(spdf, "read_tree", read):
        return results_of(corpus, out, checkpoint, ["mode=dense"])


def test_a_configuration_that_one_rank_cannot_read(corpus, pretrained, tmp_path):
    args = (corpus, str(tmp_path / "run"), str(pretrained.run))
    first, second = run_ranks(2, no_configuration_on_rank_1, *args)
    assert first == second
    assert "No such file" in first and "(rank 1 on " in first
