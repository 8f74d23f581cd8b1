"""Work that one rank does for all: whatever it meets, every rank learns of it."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from sparse_gpt.errors import UserError

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result], where: str) -> Result:
    """Run `action` on rank 0 and give its (picklable) result to every rank. A collective.

    An `OSError` or `UserError` of rank 0 is raised on every rank as a `UserError` that names
    `where`, so that no rank waits for one that has gone.
    """
    outcome: list[object] = [None, ""]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, UserError) as problem:
            outcome[1] = f"{where}: {problem}"
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(str(outcome[1]))
    return outcome[0]  # type: ignore[return-value]
