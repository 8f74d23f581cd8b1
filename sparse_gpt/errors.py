"""The one exception that is meant for the user rather than for the programmer."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message says what was wrong, where, and which key or flag to change."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        code = main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
        code = 2
    raise SystemExit(code or 0)
