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
        epilog="A run resumes from its last checkpoint by itself. Exit codes 0, 2 (a user's error) "
        "and 75 (stopped) are final. SIGTERM, SIGINT and SIGUSR1 go on to every rank.",
    )
    parser.add_argument("--restarts", type=int, default=5, help="at most so many ...")
    parser.add_argument("--window", type=float, default=60, help="... in so many minutes")
    parser.add_argument("--backoff", type=float, default=5, help="seconds, doubled each time")
    parser.add_argument("--grace", type=float, default=60, help="seconds for orphaned ranks")
    parser.add_argument(
        "--restart-stopped", action="store_true", help="after exit code 75 too (a deadline, STOP)"
    )
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
