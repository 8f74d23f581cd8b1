"""What every rank must be able to do: where one cannot, all of them learn of it."""

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch.distributed as dist

from sparse_gpt.config import RunConfig
from sparse_gpt.durable import make_folder
from sparse_gpt.errors import TryAgain, UserError
from sparse_gpt.train.build import open_sources
from sparse_gpt.train.first_rank import on_first_rank

Result = TypeVar("Result")
LOOK_SECONDS = 5.0  # a network file system may show a new file late


def on_every_rank(action: Callable[[], object], where: str) -> None:
    """Run `action` on every rank. A collective.

    An `OSError` or `UserError` of any rank is raised on all of them as a `UserError`, so that no
    rank waits for one that has gone. It names the rank and its node unless all met the same.
    Where each is a `TryAgain`, so is what is raised.
    """
    problem, final = "", True
    try:
        action()
    except UserError as error:
        problem, final = str(error), not isinstance(error, TryAgain)
    except OSError as error:
        problem = f"{where}: {error}"
    met: list[tuple[str, bool, str]] = [("", True, "")] * dist.get_world_size()
    dist.all_gather_object(met, (problem, final, socket.gethostname()))
    said = {rank: text for rank, (text, _, _) in enumerate(met) if text}
    if not said:
        return
    rank, text = next(iter(said.items()))
    if len(said) < len(met):
        text += f" (rank {rank} on {met[rank][2]}; {len(said)} of {len(met)} ranks)"
    raise (UserError if any(met[rank][1] for rank in said) else TryAgain)(text)


@dataclass(frozen=True)
class Read(Generic[Result]):
    """What a rank read before it could tell the others; None, and the problem, where it failed."""

    value: Result | None
    problem: UserError | OSError | None

    def on_every_rank(self, where: str) -> Result:
        """The value, if every rank has one; `UserError` on all of them otherwise. A collective."""
        on_every_rank(self._raise, where)
        assert self.value is not None
        return self.value

    def _raise(self) -> None:
        if self.problem is not None:
            raise self.problem


def read_first(action: Callable[[], Result]) -> Read[Result]:
    """Run `action` on this rank, before or after the ranks have met.

    A problem waits until they have: a rank that left before would be waited for. Where there is
    no launcher, nobody waits, and it is raised.
    """
    try:
        return Read(action(), None)
    except (UserError, OSError) as problem:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        return Read(None, problem)


def check_nodes(config: RunConfig) -> None:
    """Refuse a run whose ranks do not all see the output folder and the data. A collective."""
    name = on_first_rank(lambda: _leave_probe(config.run_dir), "output_dir")
    probe = config.run_dir / name
    try:
        on_every_rank(lambda: _look_for(probe), "output_dir")
    finally:
        on_first_rank(probe.unlink, "output_dir")
    on_every_rank(lambda: open_sources(config.data), "data")


def _leave_probe(folder: Path) -> str:
    make_folder(folder)
    # A name that no node can remember as missing.
    name = f".probe-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _look_for(probe: Path) -> None:
    deadline = time.monotonic() + LOOK_SECONDS
    while not os.path.exists(probe):
        if time.monotonic() > deadline:
            raise UserError(
                f"output_dir: {probe.parent} is not the folder that rank 0 writes to; all nodes "
                "must share it"
            )
        time.sleep(0.1)
