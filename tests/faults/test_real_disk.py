"""A real file system that fills up, becomes read-only and goes: a tmpfs of a few megabytes."""

import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from tests.contracts.runs import run_config, trainer
from tests.faults import tally
from tests.ranks import run_ranks

MEGABYTES, PIECES = 24, 12


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    yield from mounted(tmp_path / "disk")


@pytest.fixture
def checkpoints_disk(tmp_path):
    yield from mounted(tmp_path / "run/checkpoints")


def mounted(folder):
    """The folder of a small file system of its own; skipped where none may be mounted."""
    folder.mkdir(parents=True)
    try:
        made = mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", folder)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        tally.note(f"no tmpfs could be mounted here: {made.stderr.strip()}")
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def free(disk):
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


def allocate(path, size):
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def refused(made, step):
    """A save of that step; what was said, or nothing where it was made."""
    made.state.step = step
    try:
        made.checkpointer.save(step, asdict(made.state))
    except UserError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def start(corpus, out):
    return run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)


def filling(corpus, disk):
    """Saves with less and less room, until none is left; what each of them said."""
    folder, filler = Path(disk) / "run/checkpoints", Path(disk) / "filler"
    found = []
    with trainer(start(corpus, f"{disk}/run")) as made:
        made.fit()
        before = {s: open_checkpoint(folder / step_folder(s)).files for s in (1, 2)}
        size = sum(entry["size"] for entry in before[2].values())
        prepare = made.checkpointer._prepare
        for piece in range(PIECES):
            room = size * piece // PIECES

            def prepared(temporary, room=room):
                prepare(temporary)
                allocate(filler, free(disk) - room)

            made.checkpointer._prepare = prepared
            said = refused(made, 3)
            found.append(said)
            assert list_steps(folder) == [1, 2], said
            for step in (1, 2):
                assert open_checkpoint(folder / step_folder(step)).files == before[step]
            dist.barrier()
            if dist.get_rank() == 0:
                filler.unlink()
            dist.barrier()
        made.checkpointer._prepare = prepare
        assert refused(made, 3) == ""
        assert list_steps(folder) == [2, 3]
        open_checkpoint(folder)
    return found


def test_a_disk_that_fills_up_anywhere_in_a_save(corpus, disk):
    folder = str(disk / "run/checkpoints")
    for said in run_ranks(2, filling, corpus, str(disk)):
        assert len(said) == PIECES
        assert all(folder in text and "No space left" in text for text in said), said
    tally.add("saves on a real disk that was full", PIECES)


def read_only(corpus, disk):
    folder = Path(disk) / "run/checkpoints"
    with trainer(start(corpus, f"{disk}/run")) as made:
        made.fit()
        made.folder.release()  # nothing is remounted that a file is open on for writing
        dist.barrier()
        if dist.get_rank() == 0:
            assert mount("-o", "remount,ro", disk).returncode == 0
        dist.barrier()
        said = refused(made, 3)
        assert list_steps(folder) == [1, 2]
        open_checkpoint(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            assert mount("-o", "remount,rw", disk).returncode == 0
        dist.barrier()
        assert refused(made, 3) == ""
        open_checkpoint(folder)
    return said


def test_a_disk_that_becomes_read_only(corpus, disk):
    for said in run_ranks(2, read_only, corpus, str(disk)):
        assert f"{disk}/run/checkpoints" in said and "Read-only file system" in said
    tally.add("saves on a real disk that was read-only")


def unmounted(corpus, disk, run):
    """The mount goes: its empty folder stays, and must not be taken for it."""
    with trainer(start(corpus, run)) as made:
        made.fit()
        dist.barrier()
        if dist.get_rank() == 0:
            subprocess.run(["umount", "--lazy", disk], check=True)
        dist.barrier()
        said = refused(made, 3)
        assert os.listdir(disk) == []
    return said


def test_a_disk_that_is_unmounted_in_a_run(corpus, disk):
    for said in run_ranks(2, unmounted, corpus, str(disk), f"{disk}/run"):
        assert f"{disk}/run/" in said and "gone" in said
    tally.add("folders that vanished in a run")


def unmounted_before(corpus, run):
    with trainer(start(corpus, run)) as made:
        with pytest.raises(UserError, match="is gone, but a run began") as caught:
            made.fit()
        return str(caught.value)


def test_a_disk_with_the_checkpoints_alone_that_is_unmounted(corpus, checkpoints_disk):
    """In a run, and before the next start of it: neither trains or saves beside it."""
    run = checkpoints_disk.parent
    for said in run_ranks(2, unmounted, corpus, str(checkpoints_disk), str(run)):
        assert f"{run}/checkpoints" in said and "gone" in said
    log = (run / "metrics.jsonl").read_bytes()
    for said in run_ranks(2, unmounted_before, corpus, str(run)):
        assert f"{run}/checkpoints is gone" in said
    assert (run / "metrics.jsonl").read_bytes() == log and os.listdir(checkpoints_disk) == []
    tally.add("folders that vanished in a run")
    tally.add("folders that had vanished at a start")


def restarted(corpus, disk):
    """A disk that is full of what a killed save left: a start clears it before it asks for room."""
    folder = Path(disk) / "run/checkpoints"
    with trainer(start(corpus, f"{disk}/run")) as made:
        made.fit()
        needed = made.checkpointer.bytes_needed()
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "step-00000003.tmp").mkdir()
            allocate(folder / "step-00000003.tmp/master-00000.safetensors", needed)
            allocate(Path(disk) / "filler", free(disk) - needed // 4)
        dist.barrier()
        made.checkpointer.check_space(best=False)
        dist.barrier()
        assert list_steps(folder) == [1, 2]
        if dist.get_rank() == 0:
            allocate(Path(disk) / "more", free(disk) - needed // 4)
        dist.barrier()
        with pytest.raises(UserError, match="MB are free") as caught:
            made.checkpointer.check_space(best=False)
    return str(caught.value)


def test_what_a_killed_save_left_takes_no_room_from_the_next_start(corpus, disk):
    for said in run_ranks(2, restarted, corpus, str(disk)):
        assert f"{disk}/run/checkpoints" in said
