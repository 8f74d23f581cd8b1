"""Start a run, and again after failures: python launch/supervise.py [options] -- deepspeed ..."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import run_main
from sparse_gpt.supervise import Supervisor


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="A run resumes from its last checkpoint by itself. Exit codes 0, 2 (a user's "
        "error), 75 (stopped) and 76 (stopped for good) are final. SIGTERM, SIGINT, SIGUSR1 and "
        "SIGHUP go on to every rank.",
    )
    restarts = Supervisor.restarts
    parser.add_argument("--restarts", type=int, default=restarts, help="at most so many ...")
    for option, default, text in (
        ("--window", Supervisor.window / 60, "... in so many minutes"),
        ("--backoff", Supervisor.backoff, "seconds, doubled each time"),
        ("--grace", Supervisor.grace, "seconds for orphaned ranks"),
    ):
        parser.add_argument(option, type=float, default=default, help=text)
    parser.add_argument("--restart-stopped", action="store_true", help="after exit code 75 too")
    parser.add_argument("command", nargs="+", help="after --: deepspeed launch/pretrain.py CONFIG")
    args = parser.parse_args()
    return Supervisor(
        args.command,
        restarts=args.restarts,
        window=60 * args.window,
        backoff=args.backoff,
        restart_stopped=args.restart_stopped,
        grace=args.grace,
    ).run()


if __name__ == "__main__":
    run_main(main)
