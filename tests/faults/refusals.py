"""Saves in which the file system refuses something, in the ranks of a test."""

import contextlib
import errno
import logging
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from sparse_gpt.durable import sha256_file
from sparse_gpt.errors import UserError
from sparse_gpt.train import checkpoint_folder
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from tests.contracts.runs import run_config, trainer
from tests.crash.runs import folder_names
from tests.faults.operations import Before, Operation, copy_tree, watched

NUMBERS = {
    "full": errno.ENOSPC,
    "read-only": errno.EROFS,
    "forbidden": errno.EACCES,
    "broken": errno.EIO,
}

NO_EXCHANGE = (checkpoint_folder, "exchange", mock.Mock(side_effect=OSError(errno.EINVAL, "none")))

# Operations that each save has: of rank 0, which publishes, and of any other; three for a file.
CERTAIN = (23, 15)


def refusal(what: str, path: Path) -> OSError:
    number = NUMBERS[what]
    return OSError(number, os.strerror(number), str(path))


def attempt(made: Any, folder: Path, before: Before | None) -> tuple[str, list[str]]:
    """One save; what it said if it was refused, and of what it warned."""
    said, warned = "", _Heard()
    checkpoint_folder.log.addHandler(warned)
    made.checkpointer.disk._warned = False
    try:
        with watched(folder, before) if before else contextlib.nullcontext():
            made.checkpointer.save(made.state.step, asdict(made.state))
    except UserError as error:
        said = str(error)
    finally:
        checkpoint_folder.log.removeHandler(warned)
    dist.barrier()
    return said, warned.lines


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def files_of(path: Path) -> dict[str, str]:
    """Of a checkpoint that is whole: its files by their digests."""
    assert open_checkpoint(path).path == path
    return {file.name: sha256_file(file) for file in path.iterdir()}


def snapshot(folder: Path, tag: str = "step") -> dict[int, dict[str, str]]:
    """Every published checkpoint (of a tag), each of them whole."""
    return {step: files_of(folder / step_folder(step, tag)) for step in list_steps(folder, tag)}


def check(folder: Path, before: dict[int, dict[str, str]], step: int, said: str) -> None:
    """What was said of a save is what is there, to the byte."""
    now, left = snapshot(folder), [files_of(path) for path in folder.glob("*.tmp")] if said else []
    if "is published, but the disk did not confirm" in said and "not saved" not in said:
        assert now[step] != before.get(step), said
        assert now == {**before, step: now[step]}, said
        assert left == ([before[step]] if step in before else []), "what it replaced is kept"
    elif said:
        assert now == before, said
        assert not left, "what was not saved takes up room"
    else:
        assert now[step] != before.get(step)
        assert step == max(now) and len(now) >= 2
        assert all(files == before[older] for older, files in now.items() if older != step)


def every_place(
    corpus: str, out: str, what: str, kinds: tuple[str, ...], step: int = 3, exchange: bool = True
) -> dict[int, int]:
    """Refuse every operation of those kinds of a save, one save each, on each rank.

    Steps 1 and 2 are there: the save of `step` 2 replaces one, with `exchange` or without.
    Returns how many operations were refused, by rank.
    """
    folder, rank = Path(out) / "checkpoints", dist.get_rank()
    kept, counted = folder.with_name("kept"), Counter[int]()
    with (
        contextlib.nullcontext() if exchange else mock.patch.object(*NO_EXCHANGE),
        trainer(run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)) as made,
    ):
        made.fit()
        dist.barrier()
        before = snapshot(folder)
        assert list(before) == [1, 2]
        if rank == 0:
            shutil.copytree(folder, kept)
        made.state.step = step
        made.state.tokens += 1  # another checkpoint than the one it may replace
        for victim in range(dist.get_world_size()):
            while _refuse_one(made, folder, what, kinds, victim, counted[victim] + 1, before):
                counted[victim] += 1
                if rank == 0:
                    copy_tree(kept, folder)
                dist.barrier()
            dist.barrier()
            if rank == 0:
                copy_tree(kept, folder)
            dist.barrier()
        made.checkpointer.save(step, asdict(made.state))  # room was made
        dist.barrier()
        assert list_steps(folder) == [step - 1, step]
        assert files_of(folder / step_folder(step)) != before.get(step)
        dist.barrier()
    return dict(counted)


def _refuse_one(
    made: Any,
    folder: Path,
    what: str,
    kinds: tuple[str, ...],
    victim: int,
    number: int,
    before: dict[int, dict[str, str]],
) -> bool:
    """A save in which `victim` meets its refusal of that number; whether it came so far."""
    met, refused = 0, ""

    def refuse(operation: Operation) -> None:
        nonlocal met, refused
        met += operation.kind in kinds
        if operation.kind in kinds and met == number:
            refused = operation.kind
            operation.tear()
            raise refusal(what, folder / operation.path)

    said, warned = attempt(made, folder, refuse if dist.get_rank() == victim else None)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (refused, warned))
    told = [said] if said else [line for _, lines in reports for line in lines]
    if not reports[victim][0] or reports[victim][0] == "exchange":  # there is another way
        assert not told, told
    else:
        assert len(told) == 1, told
        assert str(folder) in told[0], told
        assert os.strerror(NUMBERS[what]) in told[0], told
    check(folder, before, made.state.step, said)
    dist.barrier()
    return bool(reports[victim][0])


def log_on_a_full_disk(corpus: str, out: str, lines: int) -> tuple[str, list[str]]:
    """`metrics.jsonl` takes no more bytes, from its line of that number on, for good."""
    run, said = Path(out), []
    with trainer(run_config(corpus, out, max_steps=6, checkpoint__every=3)) as made:
        say = made.metrics.say
        made.metrics.say = lambda text: (said.append(text), say(text))
        met = points = 0

        def before(operation: Operation) -> None:
            nonlocal met, points
            if operation.kind != "write":
                return
            met += operation.path == "metrics.jsonl"
            points += operation.path.startswith("tensorboard/")
            # The first two of TensorBoard's are the head of its file.
            if met >= lines or (operation.path.startswith("tensorboard/") and points > 2):
                operation.tear()
                raise refusal("full", run / operation.path)

        problem = ""
        with watched(run, before):
            try:
                made.fit()
            except UserError as error:
                problem = str(error)
    return problem, said


def vanishing(corpus: str, out: str, place: str) -> str:
    """The folder of the checkpoints is moved away ahead of an operation of a save; what is said."""
    folder, rank = Path(out) / "checkpoints", dist.get_rank()
    away = folder.with_name("away")
    with trainer(run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)) as made:
        made.fit()
        made.state.step = 3
        inner = made.checkpointer._write

        def written(temporary: Path, ever: Any) -> Any:
            if place == "while writing" and rank == 0:
                os.rename(folder, away)
            dist.barrier()
            result = inner(temporary, ever)
            if place == "before publishing" and rank == 0:
                os.rename(folder, away)
            return result

        made.checkpointer._write = written
        if place == "between saves" and rank == 0:
            os.rename(folder, away)
        dist.barrier()
        said, _ = attempt(made, folder, None)
        assert not folder.exists()
        dist.barrier()
        for step in (1, 2):
            open_checkpoint(away / step_folder(step))
        assert list_steps(away) == [1, 2]
    return said


def short_of_a_rank(corpus: str, out: str, how: str) -> str:
    """A file that a rank wrote is not whole when rank 0 looks for it; what is said."""
    folder, rank = Path(out) / "checkpoints", dist.get_rank()
    with trainer(run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)) as made:
        made.fit()
        made.state.step = 3
        inner = made.checkpointer._write

        def written(temporary: Path, ever: Any) -> Any:
            result = inner(temporary, ever)
            path = temporary / "exp_avg-00001.safetensors"
            if rank == 1 and how == "short":
                os.truncate(path, path.stat().st_size // 2)
            elif rank == 1:
                path.unlink()
            return result

        made.checkpointer._write = written
        said, _ = attempt(made, folder, None)
        assert list_steps(folder) == [1, 2] and len(folder_names(folder)) == 2
    return said
