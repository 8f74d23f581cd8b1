"""The fuzzer: `python -m tests.hostile.fuzz SEED READER=CASES ...`, in a process of its own.

Each case is a valid file that was spoilt by a generator of (SEED, reader, case). The reader may
give a valid object, whose promises are checked, or raise `UserError`. Anything else, a warning
too, ends the run with the case's number; so does a case that takes 60 s of the processor, and
memory beyond what the process had when it began and 1 GiB.
"""

import json
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from sparse_gpt.errors import UserError

EXTRA_BYTES = 1 << 30
CASE_SECONDS = 60.0  # of the processor; a case takes milliseconds
LONGEST_MESSAGE = 4000


class Hangs(BaseException):
    """A case that does not end."""


def _hangs(number: int, frame: FrameType | None) -> None:
    raise Hangs


def limit_memory(extra: int = EXTRA_BYTES) -> None:
    """Let this process take so many bytes more of address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(name: str, reader: Any, seed: int, cases: int) -> dict[str, int]:
    """Counts: cases, valid, refused. Raises `AssertionError` naming the case that fails."""
    counts = {"cases": 0, "valid": 0, "refused": 0}
    for case in range(cases):
        rng = random.Random(f"{seed} {name} {case}")
        reader.spoil(rng)
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        try:
            reader.check(reader.read())
            counts["valid"] += 1
        except UserError as error:
            message = str(error)
            assert reader.named in message, f"{name} case {case}: not named: {message[:300]}"
            assert len(message) < LONGEST_MESSAGE, f"{name} case {case}: {len(message)} letters"
            counts["refused"] += 1
        except (Hangs, Exception) as error:
            trace = "".join(traceback.format_exception(error)[-6:])
            raise AssertionError(f"{name} case {case} of seed {seed}: {trace}") from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        counts["cases"] += 1
    return counts


def main(arguments: list[str]) -> None:
    """Run readers and print their counts as a line of JSON."""
    from tests.hostile.readers import READERS

    seed = int(arguments[0])
    signal.signal(signal.SIGPROF, _hangs)
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = [argument.split("=") for argument in arguments[1:]]
        readers = {}
        for name, _ in wanted:
            place = Path(folder) / name
            place.mkdir()
            readers[name] = READERS[name](place)
        limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, cases in wanted:
            found[name] = run(name, readers[name], seed, int(cases))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps({"counts": found, "grown_mib": grown}))


if __name__ == "__main__":
    main(sys.argv[1:])
