"""Write a checkpoint as a Hugging Face GPT-2 folder that stock transformers loads.

What GPT-2 cannot express becomes a folder of sparse_gpt.hf.model, which the commands here load.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a step folder, or a run (its best step if kept, else its newest)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()

    from sparse_gpt.hf.checkpoint import export_checkpoint

    print(export_checkpoint(args.checkpoint, args.out, args.dtype, args.overwrite).summary())
    return 0


if __name__ == "__main__":
    run_main(main)
