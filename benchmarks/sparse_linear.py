"""Sparse linear layers over compact storage: forward + dX + dW against the iso-FLOP dense layer.

    python benchmarks/sparse_linear.py                  what `make bench` runs: minutes
    python benchmarks/sparse_linear.py --shapes small --blocks 16x16 1x1 --threads 1 --repeats 9
    python benchmarks/sparse_linear.py --device cuda --dtypes bf16 --blocks 64x64 128x128

A layer [in, out] of GPT-3 Small, XL or 6.7B becomes as much wider as leaves the active weights
about as many; what differs is scaled by FLOPs. The ratio of times is the median over rounds in
which dense and sparse take turns; packing is included, and the slots are in random order, as
topology updates leave them. The dense layer is the fastest found, for each of its three products,
of MKL and oneDNN and of both orders of the weight; the table names them. bf16 on a
CPU without bf16 arithmetic is emulated where it is dense, so bf16 is also compared to dense fp32.

Of XL and 6.7B fewer tokens and blocks are measured unless options say otherwise. With `--seconds`
(600 by default) spent, what is left is named as not measured. Masked dense of the wider layer and
torch's CSR and BSR products are measured for Small.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.dense_linear import DTYPES, Dense, cpu_lines, has_bf16, timed  # noqa: E402
from sparse_gpt.allocator import keep_freed_memory  # noqa: E402
from sparse_gpt.ops import BlockLayout, CompactKernel, Operand, resolve_compact  # noqa: E402

SHAPES = {"small": (768, 3072), "xl": (2048, 8192), "6.7b": (4096, 16384), "tiny": (64, 128)}
TOKENS = {"small": 2048, "xl": 1024, "6.7b": 256, "tiny": 96}
BLOCKS = ("4x4", "8x8", "16x16", "32x32", "64x64", "128x128", "1x4", "4x1", "16x1", "1x1")
SPARSITIES = (0.5, 0.75, 0.9)
# Time over the dense layer's, to be reached; by block and sparsity. 1x1 is of fp32.
TARGETS = {
    "4x4": {0.5: 1.2, 0.75: 1.4, 0.9: 1.75},
    "16x16": {0.5: 1.15, 0.75: 1.35, 0.9: 1.55},
    "64x64": {0.5: 1.05, 0.75: 1.2, 0.9: 1.5},
    "1x1": {0.5: 2.0, 0.75: 2.1, 0.9: 2.7},
}
WARM_UP = 4  # rounds
PEERS_AT = 0.75  # sparsity of torch's CSR and BSR: they take seconds


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    threads: int
    sparsity: float
    block: str


def main() -> int:
    args = arguments()
    device, until = torch.device(args.device), time.monotonic() + args.seconds
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    rows: list[dict[str, Any]] = []
    left: list[Case] = []
    dense: dict[tuple[str, str, int], Dense] = {}
    for case in cases(args):
        if time.monotonic() > until:
            left.append(case)
            continue
        if device.type == "cpu":
            torch.set_num_threads(case.threads)
        for dtype in {case.dtype, "fp32"}:
            key = (case.shape, dtype, case.threads)
            if key not in dense:
                dense[key] = Dense(
                    SHAPES[case.shape], (args.tokens or TOKENS[case.shape]), dtype, device
                )
        bases = {
            dtype: dense[case.shape, dtype, case.threads]
            for dtype in dict.fromkeys((case.dtype, "fp32"))
        }
        if case.block in ("masked", "csr", "bsr"):
            row = measure_other(args, case, bases["fp32"])
        else:
            row = measure(args, case, bases)
        rows.append(vars(case) | row)
        print(line(rows[-1]), flush=True)
    report = {
        "setting": setting(args),
        "dense": [vars_of(key, d) for key, d in dense.items()],
        "rows": rows,
        "not_measured": [vars(case) for case in left],
    }
    if left:
        print(f"{len(left)} cases not measured: {args.seconds} s are over")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(rows, args.out.with_suffix(".png"), device.type == "cpu" and not has_bf16())
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--sparsities", type=float, nargs="+", choices=SPARSITIES)
    parser.add_argument("--blocks", nargs="+", metavar="OUTxIN", help="or masked, csr, bsr")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, help="default: 2048; XL 1024, 6.7B 256")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/sparse_linear.json")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """What is to be measured, the most telling first."""
    threads = args.threads or ([1, 2] if args.device == "cpu" else [1])
    sparsities = args.sparsities or SPARSITIES
    if args.shapes or args.blocks:
        chosen = [(s, args.blocks or BLOCKS, sparsities) for s in args.shapes or ["small"]]
    else:
        other = [s for s in sparsities if s == 0.75] or sparsities
        chosen = [
            ("small", ("16x16", "4x4", "64x64", "1x1"), sparsities),
            ("xl", ("16x16", "64x64"), other),
            ("6.7b", ("16x16", "64x64"), other),
            ("small", ("8x8", "32x32", "128x128", "1x4", "4x1", "16x1"), sparsities),
            ("small", ("masked",), sparsities),
            ("small", ("csr", "bsr"), [s for s in sparsities if s == PEERS_AT]),
        ]
    for shape, blocks, some in chosen:
        for dtype, count, block, sparsity in itertools.product(
            args.dtypes or DTYPES, threads, blocks, some
        ):
            others = block in ("masked", "csr", "bsr")
            if (others or shape in ("xl", "6.7b")) and dtype == "bf16" and not args.dtypes:
                continue
            yield Case(shape, dtype, count, sparsity, block)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    cuda = args.device == "cuda"
    model = [text for text in cpu_lines() if text.startswith("model name")]
    return {
        "torch": torch.__version__, "cores": os.cpu_count(), "cpu": model[0].split(": ")[1] if model
        else "", "gpu": torch.cuda.get_device_name() if cuda else None, "repeats": args.repeats,
        "targets": TARGETS, "bf16_instruction": has_bf16(),
    }  # fmt: skip


def wide(shape: tuple[int, int], sparsity: float, block: tuple[int, int]) -> tuple[int, int]:
    """`(in, out)` that blocks divide, nearest to an iso-FLOP layer's."""
    factor = (1 - sparsity) ** -0.5
    multiple = max(64, *block) if shape[0] >= 64 * max(1, max(block) // 32) else max(block)
    d_in, d_out = (max(1, round(size * factor / multiple)) * multiple for size in shape)
    return d_in, d_out


def measure(args: argparse.Namespace, case: Case, bases: dict[str, Dense]) -> dict[str, Any]:
    """The sparse layer against the dense ones, pass by pass."""
    device, dtype = torch.device(args.device), DTYPES[case.dtype]
    b_out, b_in = (int(size) for size in case.block.split("x"))
    name, kernel = resolve_compact("auto", device, (b_out, b_in), dtype)
    base = bases[case.dtype]
    d_in, d_out = wide(base.shape, case.sparsity, (b_out, b_in))
    blocks = d_out // b_out * (d_in // b_in)
    count = max(1, round(blocks * (1 - case.sparsity)))
    slots = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[:count]
    layout = BlockLayout((d_out, d_in), (b_out, b_in), slots.to(device))
    layer = Sparse(kernel, layout, (args.tokens or TOKENS[case.shape]), dtype, device)
    scale = count * b_out * b_in / (base.shape[0] * base.shape[1])
    for _ in range(WARM_UP):  # until what both free is what they get again
        for run in (layer.run, *(dense.run for dense in bases.values())):
            run()
    spent = []
    for _ in range(args.repeats):
        spent.append((layer.run(), {key: dense.run() for key, dense in bases.items()}))
    ratios = {
        key: statistics.median(
            sum(mine.values()) / sum(theirs[key].values()) / scale for mine, theirs in spent
        )
        for key in bases
    }
    target = TARGETS.get(case.block, {}).get(case.sparsity)
    # Against dense bf16 that is emulated, every kernel would win.
    emulated = device.type == "cpu" and not has_bf16()
    if case.block == "1x1":
        target = target if case.dtype == "fp32" else None
    elif device.type == "cpu" and case.dtype != "bf16" and not emulated:
        target = None
    judged = ratios["fp32" if emulated else case.dtype]
    return {
        "kernel": name, "wide": [d_in, d_out], "tokens": args.tokens or TOKENS[case.shape],
        "flops_over_dense": scale, "ratio": ratios[case.dtype], "ratio_over_fp32": ratios["fp32"],
        "forward_ratio": statistics.median(
            m["forward"] / t[case.dtype]["forward"] / scale for m, t in spent
        ),
        "backward_ratio": statistics.median(
            m["backward"] / (t[case.dtype]["dx"] + t[case.dtype]["dw"]) / scale for m, t in spent
        ),
        "seconds": statistics.median(sum(m.values()) for m, _ in spent),
        "target": target, "reached": None if target is None else judged <= target,
    }  # fmt: skip


class Sparse:
    """The sparse layer through its kernel, as training calls it."""

    def __init__(
        self, kernel: CompactKernel, layout: BlockLayout, tokens: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kernel, self.layout = kernel, layout
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.x = torch.randn(tokens, layout.shape[1], **kind).requires_grad_()
        self.dy = torch.randn(tokens, layout.shape[0], **kind)
        self.values = torch.randn(layout.count, *layout.block, **kind).requires_grad_()

    def run(self) -> dict[str, float]:
        kept: list[Tensor] = []
        operand = Operand(self.values, None, self.layout)
        forward = timed(lambda: kept.extend(self.kernel(self.x, [operand], None)))
        backward = timed(lambda: torch.autograd.grad(kept, [self.x, self.values], [self.dy]))
        return {"forward": forward, "backward": backward}


def measure_other(args: argparse.Namespace, case: Case, base: Dense) -> dict[str, Any]:
    """Masked dense of the wider layer, or torch's own sparse products."""
    d_in, d_out = wide(base.shape, case.sparsity, (16, 16))
    count = args.tokens or TOKENS[case.shape]
    x, dy = torch.randn(count, d_in), torch.randn(count, d_out)
    if case.block == "masked":
        weight = torch.randn(d_out, d_in)
        products = {
            "forward": lambda: x @ weight.t(),
            "dx": lambda: dy @ weight,
            "dw": lambda: dy.t() @ x,
        }
        scale = 1.0
    else:
        block = (16, 16) if case.block == "bsr" else (1, 1)
        active = torch.rand(d_out // block[0], d_in // block[1]) >= case.sparsity
        weight = torch.randn(d_out, d_in)
        weight *= active.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        scale = int(active.sum()) * block[0] * block[1] / (base.shape[0] * base.shape[1])
        xt, dyt = x.t().contiguous(), dy.t().contiguous()
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        if case.block == "csr":
            sparse, turned = weight.to_sparse_csr(), weight.t().contiguous().to_sparse_csr()
            products = {"forward": lambda: sparse @ xt, "dx": lambda: turned @ dyt}
        else:
            sparse = weight.to_sparse_bsr(block)
            products = {"forward": lambda: sparse @ xt}
    for run in products.values():
        run()
    spent = []
    for _ in range(min(args.repeats, 2)):
        spent.append(({name: timed(run) for name, run in products.items()}, base.run()))
    ratio = statistics.median(
        sum(mine.values()) / sum(theirs[name] for name in products) / scale
        for mine, theirs in spent
    )
    return {
        "kernel": case.block, "wide": [d_in, d_out], "tokens": count, "passes": list(products),
        "flops_over_dense": scale, "ratio": ratio, "ratio_over_fp32": ratio,
        "seconds": statistics.median(sum(m.values()) for m, _ in spent), "target": None,
        "reached": None,
    }  # fmt: skip


def vars_of(key: tuple[str, str, int], dense: Dense) -> dict[str, Any]:
    shape, dtype, threads = key
    measured = {k: statistics.median(v) for k, v in dense.seconds.items() if v}
    return {
        "shape": shape, "dtype": dtype, "threads": threads, "fastest": dense.names,
        "gflops_a_second": {k: dense.flops / v / 1e9 for k, v in measured.items()},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    target = ""
    if row["target"] is not None:
        target = f"  target {row['target']:.2f} {'reached' if row['reached'] else 'not reached'}"
    over = f" (dense fp32: {row['ratio_over_fp32']:.2f})" if row["dtype"] != "fp32" else ""
    return (
        f"{row['shape']:5s} {row['dtype']} {row['threads']} threads  {row['sparsity']:.0%} "
        f"{row['block']:>7s} {row['kernel']:>12s}  {row['ratio']:6.2f} x dense{over}{target}"
    )


def plot(rows: list[dict[str, Any]], path: Path, emulated: bool) -> None:
    """Of Small, a panel for each dtype and number of threads: ratios by block and sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["shape"] == rows[0]["shape"] and "x" in row["block"]]
    panels = list(dict.fromkeys((row["dtype"], row["threads"]) for row in rows))
    if not panels:
        return
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 2.6 * len(panels)), squeeze=False, sharex=True
    )
    blocks = [block for block in BLOCKS if any(row["block"] == block for row in rows)]
    over = "ratio_over_fp32" if emulated else "ratio"  # dense bf16 that is emulated is slow
    for axis, (dtype, threads) in zip(axes[:, 0], panels, strict=True):
        for i, sparsity in enumerate(SPARSITIES):
            some = {
                row["block"]: row
                for row in rows
                if (row["dtype"], row["threads"], row["sparsity"]) == (dtype, threads, sparsity)
            }
            at = [blocks.index(block) + 0.27 * (i - 1) for block in some if block in blocks]
            shown = [some[block] for block in some if block in blocks]
            axis.bar(at, [r[over] for r in shown], 0.25, label=f"{sparsity:.0%}")
            for place, row in zip(at, shown, strict=True):
                if row["target"] is not None:
                    axis.hlines(row["target"], place - 0.13, place + 0.13, "black")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(blocks)), blocks)
        base = dtype if over == "ratio" else "fp32"
        axis.set_ylabel(f"{dtype}, {threads} thr.\ntime / dense {base}")
    axes[0, 0].legend(title="sparsity", ncols=3, fontsize=8)
    axes[0, 0].set_title("forward + dX + dW over the iso-FLOP dense layer; lines: targets")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
