"""Compare runs: python launch/compare.py RUN [RUN ...] --out DIR (the first is the baseline)"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, e.g. runs/debug")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and plot")
    args = parser.parse_args()

    from sparse_gpt.compare import compare

    print(compare(args.runs, args.out))
    print(f"written to {args.out}: comparison.json, comparison.md, comparison.png")
    return 0


if __name__ == "__main__":
    run_main(main)
