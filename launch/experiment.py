"""Run an experiment, what of it is not done: python launch/experiment.py FILE [key=value ...]"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import UserError, run_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Stop it at any moment and start it again: finished runs are skipped, the others go "
        "on from their last checkpoints.",
    )
    parser.add_argument(
        "experiment", help="a YAML file, e.g. configs/experiments/small/iso_flop.yaml"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. data.novels.input=my_texts/")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms alone")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (cores / ranks)")
    parser.add_argument(
        "--list", action="store_true", help="show the plan, FLOPs, times and what is done"
    )
    parser.add_argument(
        "--page", action="store_true", help="make tables, plots and page anew from the records"
    )
    parser.add_argument("--work", type=Path, help="checkpoints and logs (runs/experiments)")
    parser.add_argument("--results", type=Path, help="records and tables (docs/results)")
    args = parser.parse_intermixed_args()
    only = [word for word in args.only if "=" not in word]
    overrides = [*args.overrides, *(word for word in args.only if "=" in word)]
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs: {args.jobs} is not a positive number")

    from sparse_gpt.experiment.run import RESULTS, WORK, remake_page, run_experiment

    if args.page:
        remake_page(args.experiment, overrides, args.work or WORK, args.results or RESULTS)
        return 0
    return run_experiment(
        args.experiment,
        overrides,
        only,
        args.jobs,
        args.list,
        args.work or WORK,
        args.results or RESULTS,
    )


if __name__ == "__main__":
    run_main(main)
