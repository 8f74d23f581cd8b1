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
    parser.add_argument(
        "--updates",
        type=int,
        nargs="*",
        metavar="N",
        help="estimate topology updates on N GPUs each instead (default 8 16 ... 1024)",
    )
    cluster = parser.add_argument_group("the cluster, for --updates (default: H100 SXM, bf16)")
    cluster.add_argument("--memory-gbs", type=float, default=3350, help="GB/s of a GPU's memory")
    cluster.add_argument("--network-gbs", type=float, default=50, help="GB/s of network a GPU")
    cluster.add_argument("--latency-us", type=float, default=50, help="microseconds an exchange")
    cluster.add_argument("--launch-us", type=float, default=5, help="to start an operation")
    cluster.add_argument("--peak-tflops", type=float, default=989, help="of a GPU")
    cluster.add_argument("--mfu", type=float, default=0.4, help="share of the peak in training")
    parser.add_argument("--json", action="store_true", help="machine-readable, exact integers")
    args = parser.parse_intermixed_args()
    flags = (
        "gpus",
        "vocab_size",
        "memory_gbs",
        "network_gbs",
        "latency_us",
        "launch_us",
        "peak_tflops",
        "mfu",
    )
    numbers = [(flag, getattr(args, flag)) for flag in flags]
    for flag, value in numbers + [("updates", value) for value in args.updates or ()]:
        if value is not None and not value > 0:
            raise UserError(f"--{flag.replace('_', '-')}: {value} is not a positive number")

    from sparse_gpt.config_file import load_config
    from sparse_gpt.data.megatron import is_megatron
    from sparse_gpt.data.shards import open_data
    from sparse_gpt.plan import plan, render
    from sparse_gpt.plan_updates import Cluster, update_table

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
    if args.updates is not None:
        gpus = args.updates or [2**i for i in range(3, 11)]
        cluster_figures = Cluster(
            memory=args.memory_gbs * 1e9,
            network=args.network_gbs * 1e9,
            latency=args.latency_us * 1e-6,
            launch=args.launch_us * 1e-6,
            peak=args.peak_tflops * 1e12,
            mfu=args.mfu,
        )
        print(update_table([plan(config, vocab_size, n) for n in gpus], cluster_figures))
        return 0
    result = plan(config, vocab_size, args.gpus)
    print(json.dumps(result.as_dict(), indent=2) if args.json else render(result))
    return 0


if __name__ == "__main__":
    run_main(main)
