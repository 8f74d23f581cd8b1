"""Perplexity of exported models on any text, by token and by word, with a sliding window.

    python eval/perplexity.py FOLDER --text FILE [FILE ...]
    python eval/perplexity.py FOLDER --dataset hub/Salesforce/wikitext --config wikitext-103-v1 \\
        --split test --wikitext raw

Rules. The documents are one stream, each after one end-of-document token, as in training; that
token is context only, every other token is scored exactly once. Windows of `--max-length` inputs
start every `--stride` tokens; a token is scored in the first window that holds it, so that after
the first window it has at least max_length - stride tokens of context. A result file holds, under
`perplexity`:

    nll, tokens, words, bytes, documents   the sum in nats, and what it is over
    loss, token_perplexity                 nll / tokens, and exp of it
    word_perplexity                        exp(nll / words); null where it exceeds a double
    bits_per_byte                          nll / (ln 2 * bytes)

Words are white-space words of the ORIGINAL text; for WikiText each line end counts as one more,
which gives the official 217,646 (validation) and 245,569 (test). Bytes are those of the text the
model reads. See `report.py` for the rest of the file.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import report, settings
from eval.environment import prepare_environment, resolve_device, torch_dtype, versions
from eval.model_folder import ModelFolder, check_tokenizer, open_folders
from eval.progress import Progress
from sparse_gpt.errors import UserError, run_main

if TYPE_CHECKING:
    from eval.text_source import Text


@dataclass(frozen=True)
class Window:
    """Inputs stream[start:end] predict stream[start+1:end+1]; the last `scored` of them count."""

    start: int
    end: int
    scored: int


def windows(targets: int, max_length: int, stride: int) -> Iterator[Window]:
    """Windows over `targets` predictions: each is scored exactly once.

    max_length: inputs of a window at most; stride: from one start to the next, at most
    max_length. Raises `UserError` for a stride outside 1..max_length.
    """
    if not 1 <= stride <= max_length:
        raise UserError(f"--stride must be between 1 and the window of {max_length}, got {stride}")
    done = 0
    for start in range(0, targets, stride):
        end = min(start + max_length, targets)
        yield Window(start, end, end - done)
        done = end
        if end == targets:
            return


def score_stream(
    model: Any,
    stream: list[int],
    counted: list[bool],
    *,
    max_length: int,
    stride: int,
    batch_size: int = 4,
) -> float:
    """Sum of negative log-likelihoods, in nats, of the counted tokens of a stream.

    model: a causal language model of transformers. stream: token ids, of which the first is
    context only; counted: for each id whether it is scored (the first never is). Log-softmax
    in fp32, sum in fp64. Raises `UserError` where the model gives numbers that are not finite.
    """
    import torch
    import torch.nn.functional as F

    ids = torch.tensor(stream)
    mask = torch.tensor(counted)
    plan = list(windows(len(stream) - 1, max_length, stride))
    nll = 0.0
    with torch.inference_mode(), Progress("scoring windows", len(plan)) as progress:
        for (_, scored), same in groupby(plan, key=lambda w: (w.end - w.start, w.scored)):
            group = list(same)
            for first in range(0, len(group), batch_size):
                batch = group[first : first + batch_size]
                inputs = torch.stack([ids[w.start : w.end] for w in batch]).to(model.device)
                ends = torch.tensor([w.end for w in batch])
                positions = ends[:, None] + torch.arange(1 - scored, 1)
                logits = model(inputs, use_cache=False, logits_to_keep=scored).logits
                losses = F.cross_entropy(
                    logits.float().flatten(0, 1),
                    ids[positions].flatten().to(model.device),
                    reduction="none",
                )
                keep = mask[positions].flatten().to(losses.device)
                nll += losses[keep].double().sum().item()
                progress.advance(len(batch))
    if not math.isfinite(nll):
        raise UserError(f"the model's log-likelihoods are not finite (sum {nll}): broken weights?")
    return nll


def evaluate_folder(
    folder: ModelFolder,
    text: "Text",
    *,
    stride: int | None = None,
    max_length: int | None = None,
    limit_tokens: int | None = None,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
) -> report.Result:
    """The result of one folder on one text; None takes the model's positions and half of them."""
    from eval import text_source
    from sparse_gpt.hf.stock import check_folder, stock_model, stock_tokenizer

    start = time.monotonic()
    longest = _positions(folder, max_length)
    stride = max(1, longest // 2) if stride is None else stride
    next(windows(1, longest, stride))  # refuses a wrong stride before the model is loaded
    check_folder(folder.path)
    tokenizer = stock_tokenizer(folder.path)
    check_tokenizer(folder, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder.path}: the tokenizer names no eos token, which begins documents")

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    stream: list[int] = []
    counted: list[bool] = []
    documents = []
    for document, ids in text_source.limited(text, encode, limit_tokens):
        stream += [tokenizer.eos_token_id, *ids]
        counted += [False, *[True] * len(ids)]
        documents.append(document)
    tokens = sum(counted)
    if not tokens:
        raise UserError(f"{text.label}: the text has no tokens")
    words, bytes_ = text_source.total(text, documents)
    model = stock_model(folder.path, dtype=torch_dtype(dtype))
    model.to(resolve_device(device)).eval()
    nll = score_stream(
        model, stream, counted, max_length=longest, stride=stride, batch_size=batch_size
    )
    return {
        "kind": "perplexity",
        "schema": report.SCHEMA,
        "model": {
            **folder.describe(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": longest,
            "device": str(model.device),
        },
        "settings": {
            "text": text.label,
            "source": text.source.describe(),
            "word_rule": text.word_rule,
            "max_length": longest,
            "stride": stride,
            "limit_tokens": limit_tokens,
            "batch_size": batch_size,
        },
        "versions": versions(),
        "perplexity": summary(nll, tokens, words, bytes_, len(documents)),
        "notes": [] if limit_tokens is None else [f"only the first {tokens:,} tokens were scored"],
        "seconds": round(time.monotonic() - start, 1),
    }


def summary(nll: float, tokens: int, words: int, bytes_: int, documents: int) -> dict[str, Any]:
    """The numbers under `perplexity`; see the top of this file."""
    return {
        "nll": nll,
        "tokens": tokens,
        "words": words,
        "bytes": bytes_,
        "documents": documents,
        "loss": nll / tokens,
        "token_perplexity": _exp(nll / tokens),
        "word_perplexity": _exp(nll / words),
        "bits_per_byte": nll / (math.log(2) * bytes_),
    }


def _exp(value: float) -> float | None:
    return math.exp(value) if value < math.log(sys.float_info.max) else None


def _positions(folder: ModelFolder, asked: int | None) -> int:
    positions = folder.config.get("n_positions") or folder.config.get("max_position_embeddings")
    if not isinstance(positions, int):
        raise UserError(f"{folder.path}/config.json: n_positions is missing")
    if asked is not None and asked > positions:
        raise UserError(f"--max-length {asked}: {folder.name} has {positions} positions")
    return asked or positions


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Token- and word-level perplexity.")
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="model folder, or NAME=FOLDER")
    add("--text", type=Path, nargs="+", metavar="PATH", help="txt, jsonl or parquet, or folders")
    add("--dataset", metavar="NAME", help="data set on the Hub, or a folder that mirrors one")
    add("--config", metavar="NAME", help="configuration of the data set")
    add("--split", default="test")
    add("--text-field", default="text")
    add("--wikitext", choices=("raw", "detokenised"), help="rows are WikiText lines")
    add("--stride", type=int, help="default: half of the window")
    add("--max-length", type=int, help="window in tokens; default: the model's positions")
    add("--limit-tokens", type=int, metavar="N")
    add("--batch-size", type=int, default=4)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=settings.DTYPES, default="auto", help="auto: what config.json says")
    add("--out", type=Path, default=Path("runs/perplexity"), metavar="DIR")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse, check, measure, write, print."""
    prepare_environment(offline=False)
    options = settings.parse(build_parser(), argv)
    for flag in ("stride", "max_length", "limit_tokens", "batch_size"):
        settings.positive("--" + flag.replace("_", "-"), getattr(options, flag))
    if (options.text is None) == (options.dataset is None):
        raise UserError("give either --text or --dataset")
    folders = open_folders(options.folders)
    on_disk = options.dataset is None or Path(options.dataset).is_dir()
    prepare_environment(offline=on_disk)
    from eval import text_source

    if options.text is not None:
        if options.wikitext is not None:
            raise UserError("--wikitext is for --dataset; WikiText files: name the data set")
        label = " ".join(path.name for path in options.text)
        text = text_source.Text(label, text_source.local_text(options.text, options.text_field))
    else:
        text = text_source.dataset_text(
            str(options.dataset),
            options.config,
            options.split,
            options.text_field,
            options.wikitext,
        )
    results = []
    for folder in folders:
        result = evaluate_folder(
            folder,
            text,
            stride=options.stride,
            max_length=options.max_length,
            limit_tokens=options.limit_tokens,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
        )
        results.append(result)
        path = report.write_result(options.out, folder.file_name, result)
        print(f"wrote {path}", file=sys.stderr, flush=True)
    table = report.perplexity_table(results)
    report.write_table(options.out, "perplexity", table)
    print(table)


if __name__ == "__main__":
    run_main(main)
