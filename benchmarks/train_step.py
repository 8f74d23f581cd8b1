"""Whole steps of dense, masked and compact models: time against the dense model, and memory.

    python benchmarks/train_step.py                     what `make bench` runs: minutes
    python benchmarks/train_step.py --cases step --dtypes bf16 --threads 1 2 --rounds 5
    python benchmarks/train_step.py --device cuda --dtypes bf16 --sequences 16

Cases:
    step      training steps of GPT-3 Small by the Trainer: data, forward, backward, clipping, Adam,
              topology. iso-FLOP as a whole (`--iso-flop layer`: each layer), projected head where
              the tied one alone costs more than the dense model. Target: 1.15 x the FLOPs ratio
    block     one block of the shape of GPT-3 20B, forward and backward: the CS-2's published case
    prefill   4 prompts of 256 tokens through GPT-3 Small without gradients, to the last logits
    prefill_xl  one of 1,024 tokens through 4 blocks of GPT-3 XL; only where asked for

Every arm is a process of its own. The dense arm and another take turns in a round, and the ratio is
the median over the rounds of each round's; on one thread of a CPU by the processor's time. Dense is
the same code with dense layers, in the same dtype: on CPUs without bf16 arithmetic bf16 is
emulated, and fp32 is the fair comparison. Prints a table, writes JSON (after every arm) and a plot.
`parts` are from one profiled step (`step_parts.py`).
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.dense_linear import has_bf16  # noqa: E402
from benchmarks.step_arms import UPDATE_STEP, VOCABULARY, Arm  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "step": {"kind": "step", "model": "gpt3-small", "seq_len": 1024},
    "block": {"kind": "block", "model": "20b", "layers": 1, "seq_len": 256},
    "prefill": {"kind": "prefill", "model": "gpt3-small", "seq_len": 256, "sequences": 4},
    "prefill_xl": {"kind": "prefill", "model": "gpt3-xl", "layers": 4, "seq_len": 1024},
}
# Time over the dense model's, by nominal sparsity.
TARGETS = {
    "block": {0.5: 1.2, 0.75: 1.3, 0.9: 1.5},
    "prefill": {0.5: 1.1, 0.75: 1.2, 0.9: 1.4},
}
OVER_FLOPS = 1.15  # of a training step, times the ratio of FLOPs
CS2 = {0.5: 1.30, 0.75: 1.39, 0.9: 2.82}  # published for a block, unstructured


def main() -> int:
    args = arguments()
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    old = json.loads(args.out.read_text())["rows"] if args.add and args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for case, dtype, threads in (
            (c, d, t) for c in args.cases for d in args.dtypes for t in args.threads
        ):
            dense = dense_arm(args, case, dtype, threads, folder)
            write_tokens(Path(folder) / "data", dense)
            done = list(rows)
            for found in measure(args, dense, others(args, dense)):
                rows = done + found
                measured = {group_of(row) for row in rows}
                kept = [row for row in old if group_of(row) not in measured]
                tree = {"setting": setting(args), "rows": kept + rows}
                args.out.write_text(json.dumps(tree, indent=1) + "\n")
    print(render(rows))
    plot(kept + rows, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    storages = ("compact", "masked")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["step", "block", "prefill"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--storages", nargs="+", choices=storages, default=storages)
    parser.add_argument(
        "--masked", type=float, nargs="+", default=[0.75], help="sparsities of masked steps"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("fp32", "bf16"),
        help="default: bf16 on GPUs and on CPUs that compute in it, else fp32",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--block", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", default="auto", help="of compact storage")
    parser.add_argument("--iso-flop", choices=("model", "layer"), default="model")
    parser.add_argument("--algorithm", choices=("static", "set", "rigl"), default="set")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2), help="default 0; 1 for bf16")
    parser.add_argument("--model", help="a preset; default, as for the next: each case's own")
    for key in ("--layers", "--seq-len", "--sequences"):
        parser.add_argument(key, type=int)
    parser.add_argument(
        "--loss-chunk", type=int, default=256, help="tokens with logits at a time; 0: all"
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=30, help="after which an arm begins no further round"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what --out holds of other cases, dtypes, threads"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/train_step.json")
    args = parser.parse_args()
    args.dtypes = args.dtypes or ["bf16" if args.device == "cuda" or has_bf16() else "fp32"]
    return args


def dense_arm(args: argparse.Namespace, case: str, dtype: str, threads: int, folder: str) -> Arm:
    keys = ("model", "layers", "seq_len", "sequences")
    given = {key: getattr(args, key) for key in keys if getattr(args, key)}
    return Arm(
        case=case,
        storage="dense",
        sparsity=0.0,
        block=tuple(args.block),
        dtype=dtype,
        threads=threads,
        device=args.device,
        kernel=args.kernel,
        iso_flop=args.iso_flop,
        algorithm=args.algorithm,
        zero_stage=int(dtype == "bf16") if args.zero_stage is None else args.zero_stage,
        vocabulary=args.vocabulary,
        loss_chunk=args.loss_chunk or None,
        folder=folder,
        **CASES[case] | given,
    )


def others(args: argparse.Namespace, dense: Arm) -> list[Arm]:
    """The arms to compare; masked ones of steps alone, and of sparsities asked for."""
    arms = [
        replace(dense, storage=storage, sparsity=sparsity)
        for storage in args.storages
        for sparsity in args.sparsities
        if storage == "compact" or (dense.kind == "step" and sparsity in args.masked)
    ]
    return [solvable(arm) for arm in arms]


def solvable(arm: Arm) -> Arm:
    """With a projected head where the tied one leaves nothing to solve for."""
    from benchmarks.step_arms import run_config
    from sparse_gpt.errors import UserError
    from sparse_gpt.sparse_units import solve

    if arm.kind != "step":
        return arm
    try:
        solve(run_config(arm), arm.vocabulary)
    except UserError as error:
        if "ift.head: project" not in str(error):
            raise
        print(f"{arm.sparsity:g}: {error}; taking the projected head", file=sys.stderr)
        return replace(arm, head="project")
    return arm


def write_tokens(prefix: Path, arm: Arm) -> None:
    """Random tokens for 100 steps, as one document of a Megatron pair."""
    import numpy as np

    count = 100 * arm.tokens + 1
    ids = np.random.default_rng(0).integers(arm.vocabulary, size=count, dtype=np.int32)
    prefix.with_suffix(".bin").write_bytes(ids.tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 1, 2)
    prefix.with_suffix(".idx").write_bytes(head + struct.pack("<iqqq", count, 0, 0, 1))


class Worker:
    """An arm's process; `order` it to do something, and it answers."""

    def __init__(self, arm: Arm) -> None:
        environment = {
            "OMP_NUM_THREADS": str(arm.threads),
            "DS_ACCELERATOR": arm.device,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        script = Path(__file__).with_name("step_arms.py")
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed by `working`
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(asdict(arm))],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def order(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[7:])
        self.errors.seek(0)
        raise SystemExit(f"an arm failed: {self.errors.read()[-2000:]}")


@contextlib.contextmanager
def working(arm: Arm) -> Iterator[tuple[Worker, dict[str, Any]]]:
    """A worker that has warmed up, and what it says about its model."""
    print(
        f"measuring {arm.case} {arm.model} {arm.storage} {arm.sparsity:g} {arm.dtype}, "
        f"{arm.threads} threads ...",
        file=sys.stderr,
        flush=True,
    )
    worker = Worker(arm)
    try:
        yield worker, worker.answer()
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.process.communicate()
        worker.errors.close()


def measure(
    args: argparse.Namespace, dense: Arm, arms: list[Arm]
) -> Iterator[list[dict[str, Any]]]:
    """A row for each arm so far, the dense one first; once after every other arm."""
    with working(dense) as (baseline, facts):
        first = row_of(dense, facts) | parts_of(dense, baseline) | {"ratio": 1.0}
        first["peak_bytes"] = baseline.order("peak")["peak_bytes"]
        times: list[float] = []
        rows: list[dict[str, Any]] = []
        for arm in arms:
            with working(arm) as (worker, facts):
                row = row_of(arm, facts) | parts_of(arm, worker)
                row |= worker.order("peak")
                pairs, start = [], time.monotonic()
                while not pairs or (
                    len(pairs) < args.rounds and time.monotonic() - start < args.seconds
                ):
                    pairs.append([w.order("time")["seconds"] for w in (baseline, worker)])
            times += [pair[0] for pair in pairs]
            first["seconds"] = statistics.median(times)
            row["seconds"] = statistics.median(pair[1] for pair in pairs)
            row["ratios"] = [other / base for base, other in pairs]
            row["ratio"] = statistics.median(row["ratios"])
            row["reached"] = row["target"] and row["ratio"] <= row["target"]
            rows.append(row)
            yield [first, *rows]


def row_of(arm: Arm, facts: dict[str, Any]) -> dict[str, Any]:
    """What is known of an arm before it is timed."""
    units, ratio = facts["units"], facts["flops"] / facts["base_flops"]
    kept = math.prod(arm.block) * sum(units.values())
    dims = facts["dims"]
    weights = dims["n_layer"] * (4 * dims["d_model"] ** 2 + 2 * dims["d_model"] * dims["d_ff"])
    target = None
    if arm.storage == "compact":
        over_flops = OVER_FLOPS * ratio if arm.kind == "step" else None
        target = over_flops or TARGETS[arm.kind].get(arm.sparsity)
    settings = {
        key: getattr(arm, key)
        for key in (
            *("case", "model", "storage", "sparsity", "dtype", "threads", "device", "block"),
            *("seq_len", "sequences", "head", "zero_stage", "loss_chunk"),
        )
    }
    return {
        **settings,
        "solved_sparsity": 1 - kept / weights if units else 0.0,
        **{key: value for key, value in facts.items() if key != "units"},
        "flops_ratio": ratio,
        "target": target,
        "cs2": CS2.get(arm.sparsity) if arm.kind == "block" else None,
    }


def parts_of(arm: Arm, worker: Worker) -> dict[str, Any]:
    """Seconds by part in the arm's second step, and of the topology update in its third."""
    parts = worker.order("parts")["parts"]
    found: dict[str, Any] = {"parts": parts}
    if arm.kind == "step":
        in_update = worker.order("parts")["parts"]["topology"]
        moves = arm.storage != "dense" and arm.algorithm != "static"
        found["update_seconds"] = in_update - parts["topology"] if moves else None
    return found


def setting(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    lines = Path("/proc/cpuinfo").read_text().splitlines() if args.device == "cpu" else []
    return {
        "torch": torch.__version__, "gpu": gpu, "cores": os.cpu_count(),
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), None),
        "bf16_arithmetic": args.device == "cuda" or has_bf16(),
        "iso_flop_of_steps": args.iso_flop, "algorithm": args.algorithm,
        "rounds": args.rounds, "update_step": UPDATE_STEP,
        "baseline": "the same code with dense layers of the base model, in the same dtype",
    }  # fmt: skip


def render(rows: list[dict[str, Any]]) -> str:
    """A table of ratios and memory, then one of parts."""
    lines = [
        f"{'case':>11}{'arm':>14}{'dtype':>6}{'thr':>4}{'solved':>8}{'seconds':>9}{'x dense':>9}"
        f"{'FLOPs':>7}{'target':>8}{'':>9}{'peak GB':>9}{'layers GB':>10}"
    ]
    for row in rows:
        reached = {None: "", True: "reached", False: "not"}[row.get("reached")]
        target = f"{row['target']:8.2f}" if row["target"] else f"{'':8}"
        layers = f"{sum(row['layer_bytes'].values()) / 1e9:10.3f}" if "layer_bytes" in row else ""
        lines.append(
            f"{row['case']:>11}{name_of(row):>14}{row['dtype']:>6}{row['threads']:>4}"
            f"{row['solved_sparsity']:8.1%}{row['seconds']:9.3f}{row['ratio']:9.2f}"
            f"{row['flops_ratio']:7.3f}{target}{reached:>9}{row['peak_bytes'] / 1e9:9.2f}{layers}"
        )
    lines += ["", "seconds by part, of one profiled step; update: of a topology update"]
    names = list(rows[0]["parts"])
    lines.append(f"{'case':>11}{'arm':>14}" + "".join(f"{n:>11}" for n in [*names, "update"]))
    for row in rows:
        values = [row["parts"][name] for name in names] + [row.get("update_seconds")]
        cells = "".join(f"{'' if value is None else f'{value:.3f}':>11}" for value in values)
        lines.append(f"{row['case']:>11}{name_of(row):>14}" + cells)
    return "\n".join(lines)


def name_of(row: dict[str, Any]) -> str:
    return row["storage"] + (f" {100 * row['sparsity']:g}" if row["sparsity"] else "")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratio of time to the dense model's, a bar an arm, made of its parts' shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(group_of(row) for row in rows))
    across = min(4, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(1.5 + 4.2 * across, 4.2 * down), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(down, across, squeeze=False).flatten()
    for unused in places[len(groups) :]:
        unused.axis("off")
    for axes, group in zip(places, groups):
        shown = [row for row in rows if group_of(row) == group]
        shown.sort(key=lambda row: (row["storage"] != "dense", row["storage"], row["sparsity"]))
        bottom = [0.0] * len(shown)
        for part in shown[0]["parts"]:
            heights = [
                row["ratio"] * max(0.0, row["parts"][part]) / sum(row["parts"].values())
                for row in shown
            ]
            axes.bar(range(len(shown)), heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights)]
        for at, row in enumerate(shown):
            if row["target"]:
                axes.hlines(row["target"], at - 0.4, at + 0.4, "black", label="target")
            axes.text(at, bottom[at], f"{row['ratio']:.2f}", ha="center", va="bottom")
        axes.set_xticks(range(len(shown)), [name_of(row).replace(" ", "\n") for row in shown])
        case, model, dtype, threads, device = group
        axes.set_title(f"{case}: {model}, {dtype}, {device}, {threads} threads", fontsize=9)
        axes.set_ylabel("time over the dense model's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def group_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["case"], row["model"], row["dtype"], row["threads"], row["device"]


if __name__ == "__main__":
    raise SystemExit(main())
