"""Saves that replace a checkpoint, killed: of a step that is there, and of a tag. For two ranks.

After each kill one of the two is there, whole, and what the save had not to do with is as it was.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from tests.contracts.runs import run_config, trainer
from tests.crash.runs import folder_names
from tests.faults.kills import Kill, draw, killed
from tests.faults.operations import Operation, watched
from tests.faults.refusals import NO_EXCHANGE, files_of, snapshot

HOW = ("step", "step without exchange", "best")


def at_publishing(corpus: str, out: str, how: str) -> dict[str, int]:
    """A kill of rank 0 ahead of every operation from the manifest's name to the first removals."""
    first = last = 0

    def look(operation: Operation) -> None:
        nonlocal first, last
        if operation.path.endswith("manifest.json.tmp") and operation.kind == "rename":
            first = operation.number
        last = operation.number

    def kill_of(number: int, longest: float) -> Kill | None:
        place = first + number - 1
        return Kill((0,), place, bool(number % 2), None) if place <= min(last, first + 9) else None

    with _Saves(corpus, out, how) as saves:
        with watched(saves.folder, look):
            saves.save()
        found = [first, last]
        dist.broadcast_object_list(found)
        first, last = found
        return saves.killed(kill_of, cleared=True)


def anywhere(corpus: str, out: str, how: str, seed: int, number: int) -> dict[str, int]:
    """As many saves, each with a kill of any rank at any operation or time."""
    with _Saves(corpus, out, how) as saves:
        return saves.killed(
            lambda n, longest: draw(seed, n, longest) if n <= number else None, cleared=False
        )


class _Saves(contextlib.ExitStack):
    """A run with steps 1 and 2, and a `best` of step 2, that saves one of them again."""

    def __init__(self, corpus: str, out: str, how: str) -> None:
        super().__init__()
        self.folder = Path(out) / "checkpoints"
        self.tag = how.split()[0]
        if how == "step without exchange":
            self.enter_context(mock.patch.object(*NO_EXCHANGE))
        config = run_config(corpus, out, max_steps=400, stop_at=2, checkpoint__every=1)
        self.made: Any = self.enter_context(trainer(config))
        self.made.fit()
        self.made.checkpointer.save(2, asdict(self.made.state), "best")
        dist.barrier()
        self.other = "best" if self.tag == "step" else "step"

    def save(self) -> Path:
        """Of the same step as before, or of a new best one; never of the same content."""
        state = self.made.state
        state.tokens += 1
        state.step += self.tag == "best"
        tag = None if self.tag == "step" else self.tag
        return self.made.checkpointer.save(state.step, asdict(state), tag)

    def killed(self, kill_of: Callable[[int, float], Kill | None], cleared: bool) -> dict[str, int]:
        """`cleared`: what a killed save left, so that each has the operations of the first."""
        seen, longest, number = {"kills": 0, "old": 0, "new": 0}, 0.0, 0
        state = self.made.state
        while (kill := kill_of(number := number + 1, longest)) is not None:
            before, others = snapshot(self.folder, self.tag), snapshot(self.folder, self.other)
            old = max(before)
            died, seconds = killed(kill, self.folder, number, self.save)
            longest = max(longest, 0.3 if died else seconds)
            state.tokens += 1  # as the children have it
            state.step += self.tag == "best"
            self.made.checkpointer.newest(self.tag)  # as the next start, which also clears up
            if cleared:
                self.made.checkpointer.check_space(best=False)
            now = snapshot(self.folder, self.tag)
            newest = max(now)
            reader = open_checkpoint(self.folder / step_folder(newest, self.tag), verify=False)
            new = reader.manifest["state"]["tokens"] == state.tokens
            assert newest == (state.step if new else old), kill
            assert new or (died and now[old] == before[old]), kill
            assert all(now[step] == before[step] for step in now if step != newest), kill
            assert self.tag == "best" or list(now) == [1, 2], kill
            assert snapshot(self.folder, self.other) == others, kill
            seen["kills"] += died
            seen["new" if new else "old"] += died
            dist.barrier()
        path = self.save()  # and the next save clears up
        dist.barrier()
        assert files_of(path) and list_steps(self.folder) == [1, 2]
        assert list_steps(self.folder, "best") == [state.step if self.tag == "best" else 2]
        assert len(folder_names(self.folder)) == 3
        dist.barrier()
        return seen
