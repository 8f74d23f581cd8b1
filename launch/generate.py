"""Continue a prompt with an exported folder, a run or a checkpoint."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="an exported folder, a run or a step folder")
    parser.add_argument("--prompt", default="", help="default: the start of a document")
    parser.add_argument("--max-new-tokens", type=int, help="default 100, or what fits")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0 = off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 = off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args()

    from sparse_gpt.hf.generate import exported, generate

    with exported(args.model) as folder:
        generate(
            folder,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            device=args.device,
            stream=True,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
