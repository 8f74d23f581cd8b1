"""Show what a run will take, without starting it: python launch/plan.py CONFIG [key=value ...]"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import UserError, run_main

GPT2_VOCABULARY = 50257


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a YAML file, e.g. configs/debug.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. sparsity.sparsity=0.9")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument(
        "--vocab-size", type=int, help="default: that of the data, or of GPT-2 without data"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, exact integers")
    args = parser.parse_intermixed_args()
    for flag, value in (("--gpus", args.gpus), ("--vocab-size", args.vocab_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: {value} is not a positive number")

    from sparse_gpt.config_file import load_config
    from sparse_gpt.data.megatron import is_megatron
    from sparse_gpt.data.shards import open_data
    from sparse_gpt.plan import plan, render

    config = load_config(args.config, args.overrides)
    vocab_size, source = args.vocab_size, config.data[0]
    if vocab_size is None and (source.path.exists() or is_megatron(source.path)):
        vocab_size = open_data(
            source.path,
            val_fraction=source.val_fraction,
            vocab_size=source.vocab_size,
            tokenizer=source.tokenizer,
        ).vocab_size
    elif vocab_size is None:
        vocab_size = GPT2_VOCABULARY
        print(
            f"note: there is no data at {source.path} yet, so the vocabulary is GPT-2's "
            f"{vocab_size}; --vocab-size gives another",
            file=sys.stderr,
        )
    result = plan(config, vocab_size, args.gpus)
    print(json.dumps(result.as_dict(), indent=2) if args.json else render(result))
    return 0


if __name__ == "__main__":
    run_main(main)
