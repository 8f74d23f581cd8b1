"""Exceptions that are meant for the user rather than for the programmer, and their exit codes."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start it again
# Stopped by a STOP file or a time that has come: the next start would be, too. Above 75: of several
# nodes' codes srun gives back the highest.
EXIT_STOPPED_FOR_GOOD = 76
# A start of the same command would end as this one did.
FINAL = (0, EXIT_USER_ERROR, EXIT_STOPPED_FOR_GOOD)


class UserError(ValueError):
    """Bad input: the message says what was wrong, where, and which key or flag to change."""

    code = EXIT_USER_ERROR


class TryAgain(UserError):
    """Nothing that was given is wrong: the same start may succeed later."""

    code = EXIT_FAILED


class InUse(TryAgain):
    """Another process has what this one needs."""


class Stopped(Exception):
    """A run that was asked to stop, and is saved; every rank raises it after the same step.

    `code`: the exit code of the process.
    """

    def __init__(self, text: str = "", code: int = EXIT_STOPPED) -> None:
        super().__init__(text)
        self.code = code


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; exit code 2 after a `UserError` (1 after `TryAgain`), 75 or 76 after
    `Stopped`, 1 after any other exception.

    A `UserError` is one line on stderr. A process that has not left its group of ranks ends at
    once: threads that wait for another rank would abort it on the interpreter's own way out, with
    another exit code.
    """
    try:
        code = main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        # With its end in one write: `deepspeed` runs ranks unbuffered, and they say it at once.
        print(f"{where}error: {error}\n", end="", file=sys.stderr, flush=True)
        code = error.code
    except Stopped as stopped:
        code = stopped.code
    except Exception:
        if not _joined():
            raise
        traceback.print_exc()
        code = EXIT_FAILED
    if _joined():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone
                stream.flush()
        os._exit(code or 0)
    raise SystemExit(code or 0)


def _joined() -> bool:
    """Whether this process is in a group of ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
