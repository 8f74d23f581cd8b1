"""One arm of `train_step.py` in a process of its own: a model, and orders to compute a step.

    step      GPT-3 in the Trainer: data, forward, backward, clipping, Adam, topology
    block     one transformer block: forward, and backward to its input
    prefill   a GPT's forward pass over a prompt, without gradients, to the last token's logits

Orders come by standard input, a word a line, and every answer is a line `ANSWER {...}`: `time`
a step, or its `parts`, or the `peak` of memory; at the end of the input it stops. Between orders
the process sleeps, so that arms can take turns. On one CPU thread the time is the processor's, so
that other load hardly counts; else the clock's.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 50257
# GPT-3's own table has no 20B; these are the dimensions of the CS-2's published figures.
SHAPES: dict[str, dict[str, int]] = {
    "20b": {"n_layer": 44, "n_head": 64, "d_model": 6144, "d_ff": 24576},
    "tiny": {"n_layer": 1, "n_head": 2, "d_model": 32, "d_ff": 128},
}
WARM_UP = 4  # passes of blocks and prompts, until what they free is what they get again
UPDATE_STEP = 3  # of the Trainer's steps, the one that moves the topology


@dataclass(frozen=True)
class Arm:
    """What one process measures. `layers`: None for the model's own number."""

    case: str
    kind: str  # step, block or prefill
    storage: str  # dense, masked or compact
    sparsity: float  # nominal
    model: str
    seq_len: int
    block: tuple[int, int]
    dtype: str
    threads: int
    device: str
    kernel: str
    layers: int | None = None
    sequences: int = 1
    loss_chunk: int | None = None
    iso_flop: str = "layer"
    head: str = "dense"
    algorithm: str = "set"
    zero_stage: int = 0
    vocabulary: int = VOCABULARY
    folder: str = ""  # of the Trainer's data

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len

    @property
    def base(self) -> dict[str, int]:
        """Dimensions of the dense model."""
        from sparse_gpt.model.presets import preset

        dims = dict(SHAPES.get(self.model) or preset(self.model))
        return {**dims, "n_layer": self.layers or dims["n_layer"]}


def run_config(arm: Arm) -> Any:
    """The configuration of an arm in the Trainer."""
    from sparse_gpt.config import RunConfig
    from sparse_gpt.config_file import validate

    tree: dict[str, Any] = {
        "name": arm.storage,
        "output_dir": f"{arm.folder}/{arm.storage}-{arm.sparsity}-{arm.threads}-{arm.dtype}",
        "data": [{"path": f"{arm.folder}/data", "vocab_size": arm.vocabulary, "val_fraction": 0.0}],
        "seq_len": arm.seq_len,
        "micro_batch_size": arm.sequences,
        "global_batch_size": arm.sequences,
        "max_steps": 1000,
        "precision": arm.dtype,
        "model": {**arm.base, "loss_chunk": arm.loss_chunk},
        "deepspeed": {"zero_stage": arm.zero_stage},
        "checkpoint": {"resume": "never"},
        "logging": {"every": 1000},
    }
    if arm.storage != "dense":
        tree["ift"] = {"member": "wide", "iso_flop": arm.iso_flop, "head": arm.head}
        tree["sparsity"] = {
            "sparsity": arm.sparsity,
            "algorithm": arm.algorithm,
            "structure": {"type": "block", "block": list(arm.block)},
            "drop_fraction": {"type": "constant"},
            "update": {"freq": UPDATE_STEP, "stop": UPDATE_STEP + 1},
            "storage": arm.storage,
        }
        if arm.storage == "compact":
            tree["sparsity"]["kernel"] = arm.kernel
    return validate(RunConfig, tree, "benchmark")


@dataclass(frozen=True)
class Solved:
    """A model as measured: its dimensions, active blocks by weight, and the FLOPs of a step."""

    dims: dict[str, int]
    units: dict[str, int]
    flops: int
    base_flops: int


def solve_arm(arm: Arm) -> Solved:
    """Widths that blocks divide, and active blocks for the dense model's FLOPs.

    Those of the Trainer's run; elsewhere every layer has its base layer's.
    """
    if arm.kind == "step":
        from sparse_gpt.plan import plan
        from sparse_gpt.sparse_units import solve

        config = run_config(arm)
        solution, planned = solve(config, arm.vocabulary), plan(config, arm.vocabulary, 1)
        dims, units = solution.dims, {name: kept for name, (kept, _) in solution.units.items()}
        flops = [planned.flops_per_sequence, planned.base_flops_per_sequence]
    else:
        from sparse_gpt.ift.iso_flop import solve_units
        from sparse_gpt.ift.wide import widen

        sparse = arm.storage != "dense"
        dims = widen(arm.base, arm.sparsity, multiple_of=math.lcm(*arm.block))
        units = solve_units(arm.base, dims, arm.block) if sparse else {}
        flops = [flops_of(arm, dims, units), flops_of(arm, arm.base, {})]
    return Solved(dims, units, *(count * arm.sequences for count in flops))


def flops_of(arm: Arm, dims: dict[str, int], units: dict[str, int]) -> int:
    """A sequence through blocks: forward and backward, or forward and the head for one token."""
    from sparse_gpt.model.flops import sequence_flops

    active = {name: kept * math.prod(arm.block) for name, kept in units.items()}
    parts = sequence_flops(dims, arm.seq_len, arm.vocabulary, active)
    if arm.kind == "block":
        return parts.total - 3 * parts.head
    return parts.forward - parts.head + parts.head // arm.seq_len


class Ended(Exception):
    """No more orders."""


class Orders:
    """Answers after each step what was ordered before it, then waits for the next order."""

    def __init__(
        self, arm: Arm, model: Any, facts: dict[str, Any], methods: Iterable[tuple[Any, str]] = ()
    ) -> None:
        from benchmarks.step_parts import Parts

        self.parts, self.facts = Parts(model, methods), facts
        facts["kernel"] = kernel_of(model)
        alone = arm.device == "cpu" and arm.threads == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.order = "begin"

    def stepped(self, *_: Any) -> None:
        """Called behind every step; the first one has only warmed up."""
        synchronize()
        if self.order == "parts":
            self.answer({"parts": self.parts.stop(time.perf_counter() - self.began)})
        elif self.order == "time":
            self.answer({"seconds": self.clock() - self.start})
        else:
            self.answer(self.facts)
        while (order := sys.stdin.readline().strip()) == "peak":
            self.answer({"peak_bytes": peak_bytes()})
        if order not in ("time", "parts"):
            raise Ended
        self.order = order
        if self.order == "parts":
            self.parts.start()
        self.began, self.start = time.perf_counter(), self.clock()

    @staticmethod
    def answer(values: dict[str, Any]) -> None:
        print("ANSWER " + json.dumps(values), flush=True)


def kernel_of(model: Any) -> str | None:
    """The name of the kernel that computes compact layers."""
    from sparse_gpt.model.linear import SparseLinear
    from sparse_gpt.ops import COMPACT

    names = {kernel: name for name, kernel in COMPACT.items()}
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return next((names[x.compact_kernel] for x in layers if x.layout is not None), None)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Of this process so far: resident memory, or what a GPU's allocator gave out."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve_trainer(arm: Arm) -> None:
    """Steps of `Trainer.fit`."""
    from sparse_gpt.train.loop import Trainer

    solved = solve_arm(arm)
    trainer = Trainer(run_config(arm))
    controller = trainer.controller
    facts: dict[str, Any] = asdict(solved)
    methods = [(controller, name) for name in ("before_step", "arm", "after_step", "_on_stepped")]
    orders = Orders(arm, trainer.engine.module, facts, methods)
    scores = controller.before_step

    def weigh_then_score(step: int) -> Any:
        if "layer_bytes" not in facts:  # gradients are there
            facts["layer_bytes"] = layer_bytes(trainer)
        return scores(step)

    controller.before_step = weigh_then_score
    trainer.metrics.advance = orders.stepped
    with contextlib.suppress(Ended):
        trainer.fit()


def layer_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of the layers that are, or could be, sparse: by what they are; counted once."""
    from torch.utils._pytree import tree_leaves

    shards, sums, seen = trainer.shards, Counter(), set()
    for name, layer in trainer.engine.module.sparse_layers().items():
        tensors = {"weights": layer.weight.data, "gradients": shards.gradient(name)}
        fragment = shards.fragment(name)
        tensors |= {} if fragment is None else fragment.tensors()
        for kind, tensor in tensors.items():
            if tensor is not None and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                sums[kind] += tensor.nbytes
        if layer.layout is not None:  # with what kernels keep there
            kept = tree_leaves([layer.layout.slots, layer.layout._views, layer.layout.cache])
            sums["views"] += sum(leaf.nbytes for leaf in kept if hasattr(leaf, "nbytes"))
    return dict(sums)


def serve_blocks(arm: Arm) -> None:
    """Steps of blocks without a Trainer; values of compact weights are drawn as they are."""
    import torch

    from sparse_gpt.allocator import keep_freed_memory

    if arm.device == "cpu":
        keep_freed_memory()  # as the Trainer does
    torch.set_num_threads(arm.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(arm.device), getattr(torch, DTYPES[arm.dtype])
    solved = solve_arm(arm)
    with torch.device(device):
        model, run = (train_block if arm.kind == "block" else prefill)(arm, solved, dtype)
    orders = Orders(arm, model, asdict(solved))
    for _ in range(WARM_UP):
        run()
    with contextlib.suppress(Ended):
        while True:
            run()
            orders.stepped()


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def built(arm: Arm, solved: Solved, make: Callable[..., Any], dtype: Any) -> Any:
    """`make(config, layouts)` with random weights, and the kernel asked for."""
    import torch

    from sparse_gpt.model.flops import linear_shapes
    from sparse_gpt.model.gpt import GPTConfig
    from sparse_gpt.model.linear import SparseLinear
    from sparse_gpt.ops import BlockLayout, resolve_compact

    shapes = linear_shapes(solved.dims)
    layouts = {}
    for name, kept in solved.units.items() if arm.storage == "compact" else ():
        out, inner = shapes[name]
        slots = torch.randperm(out * inner // math.prod(arm.block))[:kept]
        layouts[name] = BlockLayout((out, inner), arm.block, slots)
    config = GPTConfig(**solved.dims, vocab_size=arm.vocabulary, n_positions=arm.seq_len)
    model = make(config, layouts).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for layer in model.modules():
        if isinstance(layer, SparseLinear) and layer.layout is not None:
            _, layer.compact_kernel = resolve_compact(
                arm.kernel, torch.device(arm.device), arm.block, dtype
            )
    return model


def train_block(arm: Arm, solved: Solved, dtype: Any) -> tuple[Any, Callable[[], None]]:
    import torch

    from sparse_gpt.model.gpt import Block

    model = built(arm, solved, lambda config, layouts: Block(config, "h.0", layouts), dtype)
    shape = (arm.sequences, arm.seq_len, solved.dims["d_model"])
    x, gradient = torch.randn(2, *shape, dtype=dtype)
    x.requires_grad_()

    def run() -> None:
        x.grad = None
        model.zero_grad()
        model(x, None).backward(gradient)

    return model, run


def prefill(arm: Arm, solved: Solved, dtype: Any) -> tuple[Any, Callable[[], None]]:
    import torch

    from sparse_gpt.model.gpt import GPT

    model = built(arm, solved, GPT, dtype).eval()
    prompt = torch.randint(arm.vocabulary, (arm.sequences, arm.seq_len))

    @torch.no_grad()
    def run() -> None:
        last = model.hidden(prompt)[:, -1]
        torch.nn.functional.linear(last, model.wte.weight)

    return model, run


def main() -> int:
    tree = json.loads(sys.argv[1])
    arm = Arm(**{**tree, "block": tuple(tree["block"])})
    (serve_trainer if arm.kind == "step" else serve_blocks)(arm)
    os._exit(0)  # DeepSpeed's own teardown has nothing to do with this


if __name__ == "__main__":
    raise SystemExit(main())
