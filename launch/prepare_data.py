"""Prepare text for pretraining: `python launch/prepare_data.py --input PATH --out DIR`.

With no --input and no --dataset, the text is Python's own standard library: no download.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_gpt.data import corpus
from sparse_gpt.data.holdout import HoldoutRule
from sparse_gpt.data.prepare import PrepareOptions, prepare
from sparse_gpt.data.shard_index import ShardIndex
from sparse_gpt.errors import UserError, run_main


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tokenise text into shards with a held-out split.",
        epilog="Documents: a .txt file is one, a row of .jsonl (.gz, .zst) or .parquet is one. "
        "Documents of white space only are left out. Without --input and --dataset the text is "
        "Python's own standard library (at most 10 MB).",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="PATH", help="files and folders")
    source.add_argument("--dataset", metavar="NAME", help="Hugging Face data set, or its folder")
    parser.add_argument("--config", help="configuration of the data set")
    parser.add_argument(
        "--split-map",
        metavar="OURS=THEIRS,...",
        help="splits of the data set to use, for example train=train,val=validation,test=test "
        "(the default takes those of the three it has); without val, documents are held out",
    )
    parser.add_argument("--text-field", default="text", help="field with the text (%(default)s)")
    parser.add_argument("--encoding", default="utf-8", help="of txt files (%(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--tokenizer",
        default="sentencepiece",
        metavar="KIND|PATH",
        help="train sentencepiece (unigram), sentencepiece-bpe, bpe (byte-level) or use bytes; or "
        "the path of a Hugging Face folder, GPT-2 files or a sentencepiece .model (%(default)s)",
    )
    parser.add_argument("--vocab-size", type=int, help="of a trained tokenizer (8192)")
    parser.add_argument(
        "--tokenizer-sample-bytes",
        type=int,
        default=10_000_000,
        help="text to train the tokenizer on, spread over the corpus (%(default)s)",
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, help="(%(default)s)")
    parser.add_argument("--val-documents", type=int, help="an exact number instead")
    parser.add_argument("--test-fraction", type=float, default=0.0, help="(%(default)s)")
    parser.add_argument("--test-documents", type=int, help="an exact number instead")
    parser.add_argument("--wikitext", choices=["raw", "detokenised"], help="rows are WikiText")
    parser.add_argument("--max-bytes", type=int, help="at most this much text of each split")
    parser.add_argument("--dtype", default="auto", help="auto, uint16 or uint32 (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out split (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace prepared data")
    return parser.parse_args(arguments)


def split_map(text: str | None, available: list[str]) -> dict[str, str]:
    """--split-map as {ours: theirs}; by default train, val(idation) and test as far as there."""
    if text is None:
        usual = {"train": "train", "val": "validation", "test": "test"}
        if "train" not in available:
            raise UserError(
                f"the data set has no train split but: {', '.join(available)}; say what to use, "
                "for example --split-map train=validation,test=test"
            )
        return {ours: theirs for ours, theirs in usual.items() if theirs in available}
    pairs = [pair.partition("=") for pair in text.split(",")]
    for ours, equals, theirs in pairs:
        if not (ours and equals and theirs):
            raise UserError(f"--split-map {text!r} is not of the form train=train,val=validation")
    if len({ours for ours, _, _ in pairs}) != len(pairs):
        raise UserError(f"--split-map {text!r} names a split twice")
    return {ours: theirs for ours, _, theirs in pairs}


def sources(args: argparse.Namespace) -> dict[str, corpus.Source]:
    """The sources that the command line names, by split."""
    common = {
        "text_field": args.text_field,
        "encoding": args.encoding,
        "wikitext": args.wikitext,
        "max_bytes": args.max_bytes,
    }
    if args.dataset is None:
        for flag, value in (("--split-map", args.split_map), ("--config", args.config)):
            if value is not None:
                raise UserError(f"{flag} goes with --dataset")
    if args.dataset is not None:
        available = corpus.dataset_splits(args.dataset, args.config)
        return {
            ours: corpus.dataset(args.dataset, config=args.config, split=theirs, **common)
            for ours, theirs in split_map(args.split_map, available).items()
        }
    if args.input is not None:
        return {"train": corpus.files(args.input, **common)}
    if args.wikitext is not None:
        raise UserError("--wikitext goes with --input or --dataset")
    limit = corpus.STDLIB_BYTES
    return {"train": corpus.standard_library(min(args.max_bytes or limit, limit))}


def print_summary(out: Path, index: ShardIndex, seconds: float) -> None:
    """What was made, as a table."""
    print(f"\n{'split':<8}{'documents':>12}{'tokens':>16}{'words':>14}{'bytes/token':>13}")
    for name, split in index.splits.items():
        ratio = split.bytes / split.tokens
        print(f"{name:<8}{split.documents:>12,}{split.tokens:>16,}{split.words:>14,}{ratio:>13.3f}")
    tokens = sum(split.tokens for split in index.splits.values())
    print(
        f"vocabulary {index.vocab_size:,} ({index.dtype}), {tokens:,} tokens in {seconds:.1f} s\n"
        f"tokenizer sha256 {index.tokenizer_sha256}\nwritten to {out}"
    )


def main() -> None:
    """Parse, prepare, report."""
    args = parse()
    started = time.monotonic()
    options = PrepareOptions(
        out=args.out,
        sources=sources(args),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        tokenizer_sample_bytes=args.tokenizer_sample_bytes,
        holdout=HoldoutRule(
            args.seed,
            args.val_fraction,
            args.val_documents,
            args.test_fraction,
            args.test_documents,
        ),
        workers=args.workers,
        overwrite=args.overwrite,
        dtype=args.dtype,
    )
    index = prepare(options)
    print_summary(args.out, index, time.monotonic() - started)


if __name__ == "__main__":
    run_main(main)
