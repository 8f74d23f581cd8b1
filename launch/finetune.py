"""Fine-tune a pretrained model: deepspeed launch/finetune.py CONFIG [key=value ...]"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import run_main
from sparse_gpt.train.signals import listen


def main() -> int:
    listen()  # before the slow imports
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a YAML file, e.g. configs/finetune/wikitext103_dense.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. mode=sparse")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from sparse_gpt.finetune.spdf import finetune

    finetune(args.config, args.overrides)
    return 0


if __name__ == "__main__":
    run_main(main)
