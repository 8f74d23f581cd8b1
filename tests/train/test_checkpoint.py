"""Saving in real ranks: full disks, failing ranks, leftovers and retention."""

import collections
import shutil
from pathlib import Path

import pytest
import torch

from sparse_gpt.errors import UserError
from sparse_gpt.train import checkpoint_files as files
from tests.contracts.runs import run_config, trainer
from tests.crash.runs import folder_names
from tests.ranks import run_ranks
from tests.tiny import write_corpus

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "tiny", 30, 4))


def names(folder):
    return folder_names(Path(folder) / "checkpoints")


def full_disk(corpus, out):
    with trainer(run_config(corpus, out)) as made:
        made.save()
        before, whole = names(out), made.checkpointer.bytes_needed()
        usage, shutil.disk_usage = shutil.disk_usage, lambda path: Usage(9, 9, whole - 1)
        torch.distributed.barrier()
        try:
            made.state.step = 1
            with pytest.raises(UserError) as caught:
                made.save()
        finally:
            shutil.disk_usage = usage
        torch.distributed.barrier()
        assert names(out) == before == ["step-00000000"]
        torch.distributed.barrier()  # before the next save begins on any rank
        made.save()
        assert names(out) == ["step-00000000", "step-00000001"]
        written = sum(
            file.stat().st_size for file in (Path(out) / "checkpoints/step-00000001").iterdir()
        )
        return str(caught.value), written, whole


def test_too_little_disk_is_refused_on_every_rank_before_anything_is_written(corpus, tmp_path):
    for message, written, asked in run_ranks(2, full_disk, corpus, str(tmp_path / "run")):
        assert "MB are free" in message and "checkpoint.keep_last" in message
        assert written <= asked < 2 * written + 2**20


def one_rank_cannot_write(corpus, out):
    inner = files.write_tensors

    def fail(path, tensors, ranges=None):
        if path.name.startswith("exp_avg_sq-00001"):
            raise OSError(28, "No space left on device")
        return inner(path, tensors, ranges)

    with trainer(run_config(corpus, out)) as made:
        made.save()
        made.state.step = 1
        files.write_tensors = fail
        try:
            with pytest.raises(UserError) as caught:
                made.save()
        finally:
            files.write_tensors = inner
        torch.distributed.barrier()
        assert names(out) == ["step-00000000"]
        return str(caught.value)


def test_a_failure_of_one_rank_is_raised_on_all_and_publishes_nothing(corpus, tmp_path):
    for message in run_ranks(2, one_rank_cannot_write, corpus, str(tmp_path / "run")):
        assert "step 1 was not saved" in message
        assert "rank 1" in message and "No space left on device" in message


def keep_two(corpus, out):
    folder = Path(out) / "checkpoints"
    seen = []
    with trainer(run_config(corpus, out, checkpoint__keep_last=2)) as made:
        if made.rank == 0:
            for leftover in ("step-00000077.tmp", "step-00000001.old.tmp"):
                (folder / leftover).mkdir(parents=True)
                (folder / leftover / "master-00000.safetensors").write_text("torn")
        torch.distributed.barrier()
        assert made.checkpointer.newest() is None
        for step in (1, 2, 10, 11):
            made.state.step = step
            made.save()
            torch.distributed.barrier()
            seen.append(names(out))
            torch.distributed.barrier()
        assert made.checkpointer.newest() == folder / "step-00000011"
        files.open_checkpoint(folder / "step-00000010")
        made.state.step = 10  # a step done again replaces its checkpoint
        made.state.samples = 5
        made.save()
        torch.distributed.barrier()
        assert files.open_checkpoint(folder / "step-00000010").manifest["state"]["samples"] == 5
    return seen, names(out)


def test_leftovers_go_and_the_newest_stay(corpus, tmp_path):
    for seen, last in run_ranks(2, keep_two, corpus, str(tmp_path / "run")):
        assert seen == [
            ["step-00000001"],
            ["step-00000001", "step-00000002"],
            ["step-00000002", "step-00000010"],
            ["step-00000010", "step-00000011"],
        ]
        assert last == ["step-00000010", "step-00000011"]


def refuses_damage(corpus, out):
    """A damaged newest checkpoint: refused on every rank, nothing changed, no start at step 0."""
    with trainer(run_config(corpus, out, max_steps=4)) as made:
        with pytest.raises(UserError) as caught:
            made.fit()
        return str(caught.value), made.state.step


def save_two(corpus, out):
    with trainer(run_config(corpus, out, max_steps=4, checkpoint__every=2)) as made:
        made.fit()


@pytest.mark.parametrize("victim", ["exp_avg-00001.safetensors", "topology-00000.safetensors",
                                    "manifest.json"])  # fmt: skip
def test_a_flipped_bit_in_the_newest_is_refused_and_no_older_one_is_taken(corpus, tmp_path, victim):
    out = tmp_path / "run"
    run_ranks(2, save_two, corpus, str(out))
    path = out / "checkpoints/step-00000004" / victim
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for message, step in run_ranks(2, refuses_damage, corpus, str(out)):
        assert victim in message and "step-00000004" in message
        assert step == 0
    assert names(out) == ["step-00000002", "step-00000004"]
    shutil.rmtree(path.parent)  # as the message advises
    for message, _ in run_ranks(2, refuses_drift, corpus, str(out)):
        assert "max_steps: 4 -> 12" in message


def refuses_drift(corpus, out):
    with trainer(run_config(corpus, out)) as made:
        with pytest.raises(UserError) as caught:
            made.fit()
        return str(caught.value), made.state.step


def modes(corpus, out):
    said = []
    for mode in ("required", "never"):
        with trainer(run_config(corpus, out, checkpoint__resume=mode)) as made:
            if mode == "never":
                made.save()
            with pytest.raises(UserError) as caught:
                made.fit()
            said.append(str(caught.value))
    return said


def test_resume_required_and_never(corpus, tmp_path):
    for required, never in run_ranks(2, modes, corpus, str(tmp_path / "run")):
        assert "checkpoint.resume: no checkpoint in" in required
        assert "checkpoint.resume is never" in never and "step-00000000" in never
