"""What N:M masks cost, against one top-k of the whole weight, and against linear programs.

    python benchmarks/n_m.py                    a weight of 6144 x 1536
    python benchmarks/n_m.py --shape 1536 768 --repeats 1

Prints a table and writes it as JSON. Times are the processor's on a CPU, of all threads, so that
other load hardly counts. For each pattern: the time for the whole weight; the same over the time
of `torch.topk` of as many of its magnitudes (the unstructured mask of that sparsity); for
transposable ones also the time of a linear program (HiGHS) a tile, from a sample of tiles, over
ours, and our total magnitude over the program's in the worst tile of the sample.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PATTERNS = [
    *[(n, m, False) for n, m in ((2, 4), (1, 4), (2, 8))],
    *[(n, m, True) for n, m in ((2, 4), (1, 4), (4, 8), (2, 8), (1, 8))],
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[6144, 1536])
    parser.add_argument("--sample", type=int, default=1000, help="tiles for the linear program")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/n_m.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(*args.shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for n, m, transposable in PATTERNS:
        kind = "transposable " if transposable else ""
        print(f"measuring {kind}{n}:{m} ...", file=sys.stderr, flush=True)
        rows.append(measure(weight, n, m, transposable, args.repeats, args.sample))
    print(render(rows))
    setting = {
        "shape": args.shape, "repeats": args.repeats, "sample": args.sample,
        "torch": torch.__version__, "device": device.type, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "baseline": "torch.topk of n/m of all magnitudes of the weight",
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(f"written to {args.out}")
    return 0


def measure(
    weight: torch.Tensor, n: int, m: int, transposable: bool, repeats: int, sample: int
) -> dict[str, Any]:
    """One row of the table; ours and the baseline take turns."""
    from sparse_gpt.topology.n_m import magnitude_keys, n_m_mask, tiles_of, transposable_of

    keys = magnitude_keys(weight)
    solve = transposable_of if transposable else n_m_mask
    ours, baseline = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: solve(keys, n, m)))
        baseline.append(seconds(lambda: top_k(weight, weight.numel() * n // m)))
    row: dict[str, Any] = {
        "n": n, "m": m, "transposable": transposable,
        "seconds": statistics.median(ours),
        "topk_seconds": statistics.median(baseline),
        "over_topk": statistics.median(ours) / statistics.median(baseline),
    }  # fmt: skip
    if transposable:
        from benchmarks.tile_lp import best_totals

        tiles = tiles_of(weight.abs(), m)[:sample].cpu()
        mask = tiles_of(solve(keys, n, m), m)[:sample].cpu()
        start = time.process_time()
        best = best_totals(tiles, n)
        a_tile = (time.process_time() - start) / len(tiles)
        found = (tiles * mask).sum((1, 2)).double().numpy()
        row["lp_over_ours"] = a_tile * weight.numel() / m**2 / row["seconds"]
        row["worst_share_of_optimum"] = float((found / best).min())
    return row


def top_k(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The unstructured mask of the same number of weights."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().view(-1).topk(count, sorted=False).indices] = True
    return mask


def seconds(run: Callable[[], object]) -> float:
    """Time of a call: the processor's, or with a GPU until it is done."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def render(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'pattern':>18}{'seconds':>10}{'x top-k':>10}{'LP x':>10}{'worst tile':>12}"]
    for row in rows:
        name = f"{row['n']}:{row['m']}" + (" transposable" if row["transposable"] else "")
        line = f"{name:>18}{row['seconds']:10.3f}{row['over_topk']:10.2f}"
        if row["transposable"]:
            line += f"{row['lp_over_ours']:10.1f}{row['worst_share_of_optimum']:12.6f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
