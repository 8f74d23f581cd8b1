"""At every operation of a save: the newest checkpoint there is whole, old ones go after it."""

import errno
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from sparse_gpt.train import checkpoint_folder
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from tests.contracts.runs import run_config, trainer
from tests.crash.runs import folder_names
from tests.faults import tally
from tests.faults.operations import watched
from tests.ranks import run_ranks


class Looker:
    """Sees the folder at every operation; `names` that were published there, in order."""

    def __init__(self, folder):
        self.folder, self.seen, self.looked = folder, [], 0

    def __call__(self, operation):
        self.looked += 1
        now = {tag: list_steps(self.folder, tag) for tag in ("step", "best")}
        for tag, steps in now.items():
            for step in steps:
                open_checkpoint(self.folder / step_folder(step, tag))
        if not self.seen or self.seen[-1] != now:
            self.seen.append(now)


def saves(corpus, out, keep_last, steps):
    """Saves of those steps, at each operation of which rank 0 looks; what it saw."""
    folder = Path(out) / "checkpoints"
    look = Looker(folder)
    with trainer(run_config(corpus, out, checkpoint__keep_last=keep_last)) as made:
        if dist.get_rank() == 0:
            (folder / "step-00000099.tmp").mkdir(parents=True)
            (folder / "step-00000099.tmp/rng-00000.safetensors").write_text("torn")
        for tag, step in steps:
            made.state.step = step
            with watched(folder, look if dist.get_rank() == 0 else lambda operation: None):
                made.checkpointer.save(step, asdict(made.state), None if tag == "step" else tag)
        look(None)
    return look.seen, look.looked


def seen_at(corpus, tmp_path, keep_last, steps):
    seen, looked = run_ranks(2, saves, corpus, str(tmp_path / "run"), keep_last, steps)[0]
    tally.add("moments of a save at which all checkpoints there were verified", looked)
    return seen


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_an_old_one_goes_after_the_new_one_is_there(corpus, tmp_path, keep_last):
    numbers = [1, 2, 3, 4, 5]
    seen = seen_at(corpus, tmp_path, keep_last, [("step", number) for number in numbers])
    expected = [[]]
    for number in numbers:
        expected.append([*expected[-1], number])
        if len(expected[-1]) > keep_last:
            expected.append(expected[-1][1:])
    assert [now["step"] for now in seen] == expected
    assert folder_names(tmp_path / "run/checkpoints") == [
        step_folder(number) for number in numbers[-keep_last:]
    ]


def test_a_tag_keeps_the_one_saved_last_and_no_step_goes_for_it(corpus, tmp_path):
    steps = [("step", 4), ("best", 2), ("best", 6), ("step", 8), ("best", 3)]
    seen = seen_at(corpus, tmp_path, 2, steps)
    assert [now["best"] for now in seen if now["step"] == [4, 8]] == [[6], [3, 6], [3]]
    assert all(now["best"] for now in seen[3:])


def without_exchange(corpus, out, keep_last, steps):
    """As on a file system that cannot exchange two names."""
    inner = checkpoint_folder.exchange

    def refuse(first, second):
        raise OSError(errno.EINVAL, "Invalid argument", str(first))

    checkpoint_folder.exchange = refuse
    try:
        return saves(corpus, out, keep_last, steps)
    finally:
        checkpoint_folder.exchange = inner


def test_a_step_done_again_is_replaced_at_once(corpus, tmp_path):
    steps = [("step", 4), ("step", 8), ("step", 8), ("best", 8), ("best", 8), ("step", 4)]
    seen = seen_at(corpus, tmp_path, 2, steps)
    assert [now["step"] for now in seen] == [[], [4], [4, 8], [4, 8]]
    assert [now["best"] for now in seen] == [[], [], [], [8]]


def gap(corpus, out):
    """Killed between the two renames that stand for an exchange: what a later start finds."""
    folder = Path(out) / "checkpoints"
    with trainer(run_config(corpus, out)) as made:
        save = made.checkpointer.save
        for step in (4, 8):
            made.state.step = step
            save(step, asdict(made.state))
        dist.barrier()
        before = open_checkpoint(folder / "step-00000008").files
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(folder / "step-00000004", folder / "step-00000008.tmp")
            (folder / "step-00000008").rename(folder / "step-00000008.replaced.tmp")
        dist.barrier()
        assert made.checkpointer.newest() == folder / "step-00000008"
        assert open_checkpoint(folder / "step-00000008").files == before
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "step-00000008").rename(folder / "step-00000008.replaced.tmp")
        made.state.step = 12
        save(12, asdict(made.state))
        dist.barrier()
        assert list_steps(folder) == [8, 12]
        assert open_checkpoint(folder / "step-00000008").files == before
        assert len(folder_names(folder)) == 2


def test_where_names_cannot_be_exchanged_a_killed_replacement_is_put_back(corpus, tmp_path):
    steps = [("step", 4), ("step", 8), ("step", 8)]
    seen, _ = run_ranks(2, without_exchange, corpus, str(tmp_path / "run"), 2, steps)[0]
    assert [now["step"] for now in seen] == [[], [4], [4, 8], [4], [4, 8]]
    run_ranks(2, gap, corpus, str(tmp_path / "gap"))
