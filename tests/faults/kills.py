"""A run of two ranks that is killed in its saves, again and again, and goes on. For its ranks.

Every save is made by forked children of the ranks (`forked.py`). One of them, or both, are killed
there: ahead of an operation on a file, in the middle of a write, or at any time. What is then on
the disk is opened and verified, and the parents go on from it as a run does that starts again.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint, step_folder
from sparse_gpt.train.watch import Watch
from tests.contracts.runs import run_config, trainer
from tests.crash.runs import folder_names
from tests.faults import forked
from tests.faults.operations import Operation, watched

RANKS, OPERATIONS = 2, 60  # about as many as a save of rank 0 has, with what it removes


@dataclass(frozen=True)
class Kill:
    """Whom, and where: ahead of an operation or in the middle of it, or after some seconds."""

    ranks: tuple[int, ...]
    operation: int | None
    torn: bool
    seconds: float | None


class Killed(UserError):
    """Unwinds the parents out of `fit`, on all ranks together, as the death of the run would."""


def draw(seed: int, number: int, longest: float) -> Kill:
    """The kill of that number: a function of the seed, the same on every rank."""
    generator = random.Random(f"{seed} {number}")
    ranks = generator.choice([(0,), (1,), (0, 1)])
    if generator.random() < 0.25:
        return Kill(ranks, None, False, generator.uniform(0.0, longest))
    # Rank 1 has fewer operations; and what comes after the last one is no kill.
    last = OPERATIONS if 0 in ranks else 22
    return Kill(ranks, generator.randint(1, last), generator.random() < 0.5, None)


def config_of(corpus: str, out: str, **changes: Any) -> Any:
    """RigL, dropout, a save after every step, the newest two kept."""
    settings = {
        "max_steps": 1000,
        "model__dropout": 0.1,
        "sparsity__algorithm": "rigl",
        "checkpoint__every": 1,
    }
    return run_config(corpus, out, **settings, **changes)


def undisturbed(
    corpus: str, out: str, last: int
) -> tuple[dict[int, dict[str, Any]], dict[int, float]]:
    """What each checkpoint up to a step holds, digests of its files and its state; the losses."""
    found: dict[int, dict[str, Any]] = {}
    with trainer(config_of(corpus, out, stop_at=last)) as made:
        save = made.checkpointer.save

        def noted_save(step: int, state: dict[str, Any], tag: str | None = None) -> Path:
            path = save(step, state, tag)
            found[step] = contents(path)
            dist.barrier()  # before the next save removes anything
            return path

        made.checkpointer.save = noted_save
        made.fit()
    return found, losses(Path(out))


def contents(path: Path) -> dict[str, Any]:
    """Verified: every file of a checkpoint by its digest, and the state of the run."""
    reader = open_checkpoint(path)
    assert reader.path == path
    return {"files": reader.files, "state": reader.manifest["state"]}


def killed_saves(
    corpus: str, out: str, seed: int, kills: int, expected: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Kill `kills` saves; returns what was found. Fails at the first broken promise."""
    seen: dict[str, Any] = {"kills": 0, "saved": 0, "new": 0, "old": 0, "last": 0}
    folder = Path(out) / "checkpoints"
    longest = 0.0
    with trainer(config_of(corpus, out, stop_at=1)) as made:
        made.fit()  # an undisturbed save: there is something to keep
        config = made.config
        save, number = made.checkpointer.save, 0

        def killed_save(step: int, state: dict[str, Any], tag: str | None = None) -> Path:
            nonlocal number, longest
            number += 1
            kill = draw(seed, number, longest)
            before = list_steps(folder)
            died, seconds = killed(kill, folder, number, lambda: save(step, state, tag))
            longest = max(longest, 0.3 if died else seconds)
            problem = ""
            try:
                _judge(folder, before, step, died, expected, seen)
            except (AssertionError, UserError) as error:
                problem = f"seed {seed}, kill {number}, {kill}: {type(error).__name__}: {error}"
            problems: list[str] = [""] * RANKS
            dist.all_gather_object(problems, problem)
            assert not any(problems), problems
            seen["kills"] += died
            raise Killed(str(kill))

        check_space = made.checkpointer.check_space
        made.checkpointer.save = killed_save
        made.checkpointer.check_space = lambda best: None  # the save that is killed clears up
        made.config = config.model_copy(update={"stop_at": None})
        while seen["kills"] < kills:
            made.watch = Watch(config.timeouts)
            with contextlib.suppress(Killed):
                made.fit()
                raise AssertionError(f"the run ended at step {made.state.step}")
        made.checkpointer.save, made.checkpointer.check_space = save, check_space
        made.watch = Watch(config.timeouts)
        made.config = config.model_copy(update={"stop_at": list_steps(folder)[-1] + 1})
        made.fit()  # it goes on, and nothing of the dead is left
        seen["last"] = made.state.step
        dist.barrier()
        assert contents(folder / step_folder(seen["last"])) == expected[seen["last"]]
        assert list_steps(folder) == [seen["last"] - 1, seen["last"]]
        assert len(folder_names(folder)) == 2
    seen["losses"] = losses(Path(out))
    return seen


def killed(kill: Kill, folder: Path, number: int, save: Callable[[], Any]) -> tuple[bool, float]:
    """A save in children of the ranks: whether it died of `kill`, and the seconds it took."""
    dist.barrier()
    rank, meet = dist.get_rank(), folder.with_name(f"meet-{number}")
    began = time.monotonic()
    child, reader = forked.fork(_die_in(kill, rank, folder, save), meet)
    after = kill.seconds if rank in kill.ranks else None
    status = forked.wait(child, reader, after)
    statuses: list[Any] = [None] * RANKS
    dist.all_gather_object(statuses, (status, time.monotonic() - began))
    if rank == 0:
        meet.unlink(missing_ok=True)
    codes = [code for code, _ in statuses]
    died = -signal.SIGKILL in codes
    assert died or codes == [0, 0], (kill, codes)
    return died, statuses[0][1]


def _die_in(kill: Kill, rank: int, folder: Path, save: Any) -> Any:
    def before(operation: Operation) -> None:
        if operation.number != kill.operation:
            return
        if kill.torn:
            operation.tear()
        os.kill(os.getpid(), signal.SIGKILL)

    def action() -> None:
        if rank in kill.ranks and kill.operation is not None:
            with watched(folder, before):
                save()
        else:
            save()

    return action


def _judge(
    folder: Path,
    before: list[int],
    step: int,
    died: bool,
    expected: dict[int, dict[str, Any]],
    seen: dict[str, Any],
) -> None:
    """The newest checkpoint is the previous one or the new one, and each one there is whole."""
    after = list_steps(folder)
    assert after, "no checkpoint is left"
    assert after[-1] in (before[-1], step), (before, after)
    assert died or after[-1] == step
    for found in after:
        assert contents(folder / step_folder(found)) == expected[found], f"step {found} differs"
    seen["saved"] += not died
    seen["new" if after[-1] == step else "old"] += died


def losses(run: Path) -> dict[int, float]:
    """Of every logged step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    assert len(found) == sum(r["kind"] == "train" for r in records), "a step was logged twice"
    return found
