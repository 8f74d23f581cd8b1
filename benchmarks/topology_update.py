"""What a topology update costs, against gather-and-broadcast, on real ranks and a real engine.

    python benchmarks/topology_update.py          GPT-3 125M, 1, 2 and 4 ranks, ZeRO 1-3
    python benchmarks/topology_update.py --ranks 2 --stages 2 --model d128

Prints a table and writes it as JSON. For each layout: the update's time against the optimizer's
(Adam) step over the same shard, in the same run; bytes a rank sends; peak extra memory of a rank;
the share of a training step of `--tokens` tokens a rank at an update every 100 steps. Speeds are
ratios within one run. The ranks begin the Adam step together, and the update; the slowest counts.
With more ranks than cores both share them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODELS = {
    # GPT-3 Small; its Sparse Wide 75 % width; and one for a quick look.
    "125m": {"n_layer": 12, "n_head": 12, "d_model": 768},
    "125m_wide": {"n_layer": 12, "n_head": 12, "d_model": 1536},
    "d128": {"n_layer": 2, "n_head": 2, "d_model": 128},
}
UPDATE_EVERY = 100


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="125m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--tokens", type=int, default=64, help="a rank in a training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/topology_update.json")
    parser.add_argument("--worker", type=int, metavar="STAGE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        measure(args)
        return 0
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        for stage in args.stages:
            print(f"measuring {ranks} ranks, ZeRO {stage} ...", file=sys.stderr, flush=True)
            rows += run_ranks(args, ranks, stage)
    print(render(rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting(args), "rows": rows}, indent=1) + "\n")
    print(f"written to {args.out}")
    return 0


def setting(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "model": args.model, **MODELS[args.model], "sparsity": args.sparsity,
        "tokens_a_rank": args.tokens, "update_every": UPDATE_EVERY, "repeats": args.repeats,
        "torch": torch.__version__, "gpu": gpu, "cores": os.cpu_count(), "baseline":
        "gather-and-broadcast, a layer at a time (benchmarks/gather_broadcast.py)",
    }  # fmt: skip


def run_ranks(args: argparse.Namespace, ranks: int, stage: int) -> list[dict[str, Any]]:
    """One process a rank; rank 0 prints the rows."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(stage)]
    for key in ("model", "sparsity", "tokens", "repeats"):
        command += [f"--{key}", str(getattr(args, key))]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        output = processes[0].communicate()[0]
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")
    return next(json.loads(line[5:]) for line in output.splitlines() if line.startswith("ROWS "))


def measure(args: argparse.Namespace) -> None:
    """In a rank: build the engine, then measure each method."""
    import torch
    import torch.distributed as dist

    from sparse_gpt.train.engine import init_ranks

    device = init_ranks()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    engine, optimizer, controllers = build(args, device)
    rows = []
    for method, controller in controllers.items():
        rows.append(measure_method(args, engine, optimizer, controller) | {"method": method})
    if dist.get_rank() == 0:
        common = {"ranks": dist.get_world_size(), "stage": args.worker}
        print("ROWS " + json.dumps([common | row for row in rows]), flush=True)
    dist.barrier()
    os._exit(0)  # DeepSpeed's own teardown has nothing to do with this


def build(args: argparse.Namespace, device: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A real engine over random weights, and a controller a method over the same shards."""
    import torch.distributed as dist

    from sparse_gpt.config import RunConfig
    from sparse_gpt.config_file import validate
    from sparse_gpt.sparse_units import solve
    from sparse_gpt.topology.controller import TopologyController
    from sparse_gpt.topology.methods import METHODS
    from sparse_gpt.topology.schedule import UpdateSchedule
    from sparse_gpt.topology.shards import shards_of
    from sparse_gpt.topology.structure import BlockStructure
    from sparse_gpt.train.engine import build_model, deepspeed_config, start_engine

    config = validate(
        RunConfig,
        {
            "data": [{"path": "none"}], "max_steps": 1000, "seq_len": 64, "micro_batch_size": 1,
            "global_batch_size": dist.get_world_size(), "precision": "fp32",
            "model": MODELS[args.model],
            "sparsity": {"sparsity": args.sparsity, "algorithm": "rigl"},
            "deepspeed": {"zero_stage": args.worker},
        },
        "benchmark",
    )  # fmt: skip
    ds_config = deepspeed_config(config, "fp32", dist.get_world_size(), device)
    gpt = config.gpt_config(50257)
    model = build_model(config, gpt, ds_config, lambda m, gathered: m.init_weights(0, gathered))
    engine, optimizer = start_engine(model, config, ds_config)
    shards = shards_of(engine, optimizer)
    units = {name: kept for name, (kept, _) in solve(config, 50257).units.items()}
    layers = {name: model.sparse_layers()[name] for name in units}
    controllers = {
        method: TopologyController(
            layers, units, BlockStructure(), METHODS[method](UpdateSchedule(UPDATE_EVERY, 10**9)),
            0, shards,
        )
        for method in ("set", "rigl")
    }  # fmt: skip
    shards.push_masters()
    return engine, optimizer, controllers


def measure_method(
    args: argparse.Namespace, engine: Any, optimizer: Any, controller: Any
) -> dict[str, Any]:
    """Times, bytes and memory of one method's update, and of the baseline's."""
    import torch
    import torch.distributed as dist

    from benchmarks import gather_broadcast
    from benchmarks.memory import PeakMemory
    from benchmarks.traffic import counted_traffic

    layers, device = len(controller.layers), controller.shards.device
    fraction = controller.method.schedule.drop_fraction(UPDATE_EVERY)
    stepper = Stepper(args, engine, optimizer, controller, device)
    stepper.step(None)  # warms everything up

    ours, adam, training = [], [], []
    for _ in range(args.repeats):
        timed = stepper.step(stepper.update)
        ours.append(timed["inside"])
        adam.append(timed["adam"])
        training.append(timed["step"] - timed["inside"])
    ours, adam, training = (slowest(times, device) for times in (ours, adam, training))
    box: dict[str, Any] = {}

    def counted() -> None:
        with counted_traffic() as sent, PeakMemory() as peak:
            stepper.update()
        if not box or peak.peak > box["memory"].peak:  # not the group without sparse layers
            box["traffic"], box["memory"] = sent, peak

    stepper.step(counted)
    traffic, memory = box["traffic"], box["memory"]

    if controller.method.growth == "gradient":
        check_same(stepper, optimizer, fraction)
    theirs, saved = [], dict(controller.masks)
    for measured in (False, True):
        stepper.forward_backward()
        finite = controller.before_step(UPDATE_EVERY)
        assert bool(finite)
        growing = controller.method.growth == "gradient"
        with counted_traffic() as sent, PeakMemory() if measured else Nothing() as peak:
            start = together(device)
            kept = gather_broadcast.keep_gradients(controller) if growing else {}
            gather_broadcast.update(controller, kept, fraction, 1)
            if not measured:
                theirs.append(now(device) - start)
        box["baseline"], box["baseline_memory"] = sent, peak
        controller.masks = dict(saved)
        del kept
        controller.shards.push_masters()
        controller.shards.zero_gradients()
        optimizer.hold = True
        engine.step()
        optimizer.hold = False
    shard = sum(f.numel for _, f in controller.shards.fragments())
    values = torch.tensor(
        [traffic.bytes, memory.peak, memory.largest, box["baseline"].bytes,
         box["baseline_memory"].peak, max(map(float, [shard]))], dtype=torch.float64, device=device
    )  # fmt: skip
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)  # the rank with the most
    sent, peak, largest, base_sent, base_peak, shard = values.tolist()
    update, step, adam_step = (statistics.median(v) for v in (ours, training, adam))
    return {
        "update_s": update,
        "adam_s": adam_step,
        "update_over_adam": update / adam_step,
        "baseline_s": statistics.median(theirs),
        "baseline_over_update": statistics.median(theirs) / update,
        "step_s": step,
        "share_of_training": update / (UPDATE_EVERY * step + update),
        "exchanges": sum(traffic.calls.values()),
        "sent_bytes": sent,
        "sent_bytes_a_layer": sent / layers,
        "baseline_sent_bytes_a_layer": base_sent / layers,
        "peak_bytes": peak,
        "largest_tensor_bytes": largest,
        "baseline_peak_bytes": base_peak,
        "baseline_peak_over_peak": base_peak / peak,
        "shard_weights": shard,
        "sparse_layers": layers,
    }


def slowest(times: list[float], device: Any) -> list[float]:
    """Of each repeat the time of the rank that took longest."""
    import torch
    import torch.distributed as dist

    values = torch.tensor(times, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


def check_same(stepper: "Stepper", optimizer: Any, fraction: float) -> None:
    """Raise unless both ways come to the same masks from the same weights and gradients."""
    from benchmarks import gather_broadcast

    controller = stepper.controller
    stepper.forward_backward()
    controller.before_step(UPDATE_EVERY)
    growing = controller.method.growth == "gradient"
    kept = gather_broadcast.keep_gradients(controller) if growing else {}
    masks = gather_broadcast.update(controller, kept, fraction, 1, apply=False)
    optimizer.hold = True
    controller.arm(UPDATE_EVERY, True, optimizer)
    stepper.engine.step()
    controller.after_step(optimizer)
    optimizer.hold = False
    if not gather_broadcast.same_masks(controller, masks):
        raise SystemExit("the two updates come to different masks")


class Nothing:
    """A context that measures nothing."""

    peak = 0

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *error: Any) -> None:
        return None


class Stepper:
    """Training steps on random tokens, with something timed inside the optimizer's step."""

    def __init__(
        self, args: Any, engine: Any, optimizer: Any, controller: Any, device: Any
    ) -> None:
        import torch

        self.engine, self.optimizer, self.controller = engine, optimizer, controller
        self.device, self.rounds = device, max(1, args.tokens // 64)
        self.ids = torch.randint(0, 50257, (self.rounds, 64), device=device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4

    def update(self) -> None:
        self.controller._on_stepped(UPDATE_EVERY)

    def forward_backward(self) -> None:
        self.engine.train()
        self.controller.begin_step(UPDATE_EVERY)
        self.engine.backward(self.engine(self.ids, self.ids))

    def step(self, inside: Any) -> dict[str, float]:
        """One training step; `inside` runs where the topology moves, on every optimizer step."""
        controller, spent = self.controller, {"inside": 0.0}
        start = now(self.device)
        self.forward_backward()
        controller.before_step(UPDATE_EVERY)
        controller.arm(UPDATE_EVERY, inside is not None, self.optimizer)

        def timed() -> None:
            begin = together(self.device)
            inside()
            spent["inside"] += now(self.device) - begin

        if inside is not None:
            self.optimizer.on_stepped = timed
        inner, adam = type(self.optimizer).step, [0.0]

        def step(closure: Any = None) -> Any:
            hook, self.optimizer.on_stepped = self.optimizer.on_stepped, None
            begin = together(self.device)
            result = inner(self.optimizer, closure)
            adam[0] += now(self.device) - begin
            self.optimizer.on_stepped = hook
            if hook is not None:
                hook()
            return result

        self.optimizer.step = step
        self.engine.step()
        del self.optimizer.step
        if inside is not None:
            controller.after_step(self.optimizer)
        return {"step": now(self.device) - start, "adam": adam[0], **spent}


def now(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def together(device: Any) -> float:
    """The time at which every rank has come here: what follows shares cores and memory alike."""
    import torch.distributed as dist

    now(device)
    dist.barrier()
    return now(device)


def render(rows: list[dict[str, Any]]) -> str:
    """The table, a line a measurement."""
    head = (
        "ranks ZeRO method | update   Adam   ratio | base/ours | step share | exchanges "
        "KB/layer (base)  | peak MB (base)  ratio"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r['ranks']:5d} {r['stage']:4d} {r['method']:6s} | {r['update_s']:6.3f} "
            f"{r['adam_s']:6.3f} {r['update_over_adam']:6.2f}x | "
            f"{r['baseline_over_update']:8.1f}x | {100 * r['share_of_training']:9.4f}% | "
            f"{r['exchanges']:9d} {r['sent_bytes_a_layer'] / 1e3:8.1f} "
            f"({r['baseline_sent_bytes_a_layer'] / 1e3:.0f}) | {r['peak_bytes'] / 1e6:7.1f} "
            f"({r['baseline_peak_bytes'] / 1e6:.1f}) {r['baseline_peak_over_peak']:6.1f}x"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
