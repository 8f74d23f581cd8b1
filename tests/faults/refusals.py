"""Saves in which the file system refuses something, in the ranks of a test."""

import contextlib
import errno
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from tests.contracts.runs import run_config, trainer
from tests.faults.operations import Before, Operation, copy_tree, watched

NUMBERS = {
    "full": errno.ENOSPC,
    "read-only": errno.EROFS,
    "forbidden": errno.EACCES,
    "broken": errno.EIO,
}

# Operations that each save has: of rank 0, which publishes, and of any other; three for a file.
CERTAIN = (23, 15)


def refusal(what: str, path: Path) -> OSError:
    number = NUMBERS[what]
    return OSError(number, os.strerror(number), str(path))


def attempt(made: Any, folder: Path, before: Before | None) -> str:
    """One save; what it said if it was refused."""
    said = ""
    with watched(folder, before) if before else contextlib.nullcontext():
        try:
            made.checkpointer.save(made.state.step, asdict(made.state))
        except UserError as error:
            said = str(error)
    dist.barrier()
    return said


def check(folder: Path, before: dict[int, Any], step: int, said: str) -> None:
    """The newest is the previous one, or the new one; each one there is whole."""
    steps = list_steps(folder)
    assert steps and steps[-1] in (max(before), step), (steps, said)
    for found in steps:
        files = open_checkpoint(folder / step_folder(found)).files
        assert found == step or files == before[found]
    if "is saved" not in said:
        assert not list(folder.glob("*.tmp")), "what was not saved takes up room"


def every_place(corpus: str, out: str, what: str, kinds: tuple[str, ...]) -> dict[int, int]:
    """Refuse every operation of those kinds of a save, one save each, on each rank.

    Returns how many were refused, by rank.
    """
    folder, rank = Path(out) / "checkpoints", dist.get_rank()
    kept, counted = folder.with_name("kept"), Counter[int]()
    with trainer(run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)) as made:
        made.fit()  # steps 1 and 2 are there
        dist.barrier()
        before = {s: open_checkpoint(folder / step_folder(s)).files for s in list_steps(folder)}
        if rank == 0:
            shutil.copytree(folder, kept)
        made.state.step = 3
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
        made.checkpointer.save(3, asdict(made.state))  # room was made
        dist.barrier()
        assert list_steps(folder) == [2, 3]
        open_checkpoint(folder)
    return dict(counted)


def _refuse_one(
    made: Any,
    folder: Path,
    what: str,
    kinds: tuple[str, ...],
    victim: int,
    number: int,
    before: dict[int, Any],
) -> bool:
    """A save in which `victim` meets its refusal of that number; whether it came so far."""
    met = 0

    def refuse(operation: Operation) -> None:
        nonlocal met
        met += operation.kind in kinds
        if operation.kind in kinds and met == number:
            operation.tear()
            raise refusal(what, folder / operation.path)

    said = attempt(made, folder, refuse if dist.get_rank() == victim else None)
    reached = [False] * dist.get_world_size()
    dist.all_gather_object(reached, met >= number)
    if any(reached):
        assert str(folder) in said, said
        assert os.strerror(NUMBERS[what]) in said, said
        check(folder, before, 3, said)
    else:
        assert not said, said
    dist.barrier()
    return any(reached)


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
        said = attempt(made, folder, None)
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
        said = attempt(made, folder, None)
        assert list_steps(folder) == [1, 2] and len(list(folder.iterdir())) == 2
    return said
