"""The Triton kernels compiled ahead of time for a Hopper GPU, and a model of their speed.

    python benchmarks/triton_aot.py                     every shipped tile and block: minutes
    python benchmarks/triton_aot.py --blocks 64 128 --dtypes bfloat16

Needs no GPU: the kernels of `block_triton`, with the arguments and tiles that they are launched
with, are compiled to sm_90 and their machine code is looked at. For each: tensor-core instructions
of Hopper (HGMMA) and of before (HMMA), asynchronous copies to shared memory (LDGSTS) and the bits
of the widest, bytes of stack (spilled registers), registers a thread, bytes of shared memory.
Below: forward + dX + dW of a widened layer over the dense layer of the same FLOPs, **predicted** by
the model that chooses tiles (`sparse_gpt/ops/triton_configs.py`). No time here was measured.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sparse_gpt.ops import BlockLayout, launch_triton, triton_configs  # noqa: E402
from sparse_gpt.ops.launch_triton import Call, Weight  # noqa: E402
from sparse_gpt.ops.triton_configs import Problem, Tile  # noqa: E402

CAPABILITY = (9, 0)
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
}  # fmt: skip
TYPES_BY = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS = 16384
# Widened at equal FLOPs, by widths that 128 divides; so FLOPs are equal to a few percent only.
WIDENED = {0.5: (4352, 1152), 0.75: (6144, 1536), 0.9: (9728, 2432)}
LAYERS = {
    (3072, 768): WIDENED,  # MLP of GPT-3 Small
    (768, 768): {0.5: (1152, 1024), 0.75: (1536, 1536), 0.9: (2432, 2432)},  # its projections
    (8192, 2048): {0.5: (11520, 2944), 0.75: (16384, 4096), 0.9: (25856, 6528)},  # MLP of XL
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a call."""

    hgmma: int
    hmma: int
    ldgsts: int
    copy_bits: int  # of the widest asynchronous copy
    stack: int
    registers: int
    shared: int


def compile_call(call: Call) -> Compiled:
    """Machine code of a call for `CAPABILITY`, with the alignment that real tensors have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = call.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list] = {}
    for place, parameter in enumerate(kernel.params):
        value = call.arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    made: Any = triton.compile(source, target=target, options=call.options)
    usage, code = _disassemble(made.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    copies = re.findall(r"LDGSTS\.E\S*", code)
    return Compiled(
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
        hmma=len(re.findall(r"\bHMMA\b", code)),
        ldgsts=len(copies),
        copy_bits=max(
            (int((re.findall(r"\.(\d+)", copy) or [32])[0]) for copy in copies), default=0
        ),
        stack=int(found[2]),
        registers=int(found[1]),
        shared=made.metadata.shared,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) by the tool in triton's package."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tool), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    return usage, code


def calls(
    block: tuple[int, int], dtype: torch.dtype, precision: str = "ieee"
) -> Iterator[tuple[str, Tile | None, Call]]:
    """Every kernel over blocks of a size, as it is launched: (name, tile, call)."""
    out, inner = WIDENED[0.75]
    rows, columns = out // block[0], inner // block[1]
    layout = BlockLayout((out, inner), block, torch.arange(0, rows * columns, 4))
    problem = Problem((out, inner), block, layout.count, TOKENS, dtype, precision, CAPABILITY)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = empty(TOKENS, inner), empty(TOKENS, out)
    values, bias = empty(layout.count, *block), empty(out)
    norms = empty(rows, columns, dtype=torch.float32)
    forward, backward = Weight(x, values, layout), Weight(dy, values, layout)
    for tile in problem.dsd_tiles:
        yield (
            "forward",
            tile,
            launch_triton.dsd([forward], dy, tile, precision, bias=bias),
        )
        yield (
            "forward, gelu",
            tile,
            launch_triton.dsd(
                [forward], dy, tile, precision, bias=bias, activation="gelu", before=dy
            ),
        )
        yield "dX", tile, launch_triton.dsd([backward], x, tile, precision, transposed=True)
        three = [backward] * 3
        yield "dX of 3", tile, launch_triton.dsd(three, x, tile, precision, transposed=True)
    for tile in problem.sdd_tiles:
        yield "dW", tile, launch_triton.sdd(dy, x, layout, values[None], tile, precision)
    chosen = triton_configs.sparse_only(problem).score
    assert chosen is not None
    yield "score", chosen, launch_triton.score(dy, x, block, norms, chosen, precision)


def element_wise(dtype: torch.dtype) -> Iterator[tuple[str, Tile | None, Call]]:
    """The kernels without products."""
    weight = torch.empty(WIDENED[0.75], dtype=dtype, device="meta")
    layout = BlockLayout(WIDENED[0.75], (1, 1), torch.arange(64))
    sums = torch.empty(256, weight.shape[1], dtype=torch.float32, device="meta")
    for kind in ("gelu", "gelu_new"):
        call = launch_triton.activation_backward(weight, weight, kind, weight, sums)
        yield f"slope of {kind}", None, call
    values = torch.empty(64, 1, 1, dtype=dtype, device="meta")
    yield "scatter", None, launch_triton.move(weight, values, layout, scatter=True)
    yield "gather", None, launch_triton.move(weight, values, layout, scatter=False)


def model(shape: tuple[int, int], dense: tuple[int, int], block: int, sparsity: float) -> dict:
    """The predicted times of a widened layer, in times the dense layer's of the same FLOPs."""
    slots = round(shape[0] * shape[1] / block**2 * (1 - sparsity))
    problem = Problem(shape, (block, block), slots, TOKENS, torch.bfloat16, capability=CAPABILITY)
    plan = triton_configs.choose(problem)
    base = triton_configs.dense_seconds(replace(problem, shape=dense), moved=False)
    other = triton_configs.dense_seconds(problem)
    forward, backward, weight = (
        other if tile is None else seconds(tile)
        for tile, seconds in (
            (plan.forward, lambda tile: triton_configs.dsd_seconds(problem, tile)),
            (plan.backward, lambda tile: triton_configs.dsd_seconds(problem, tile, True)),
            (plan.weight, lambda tile: triton_configs.sdd_seconds(problem, tile, plan.split)),
        )
    )
    sparse = sum(tile is not None for tile in (plan.forward, plan.backward, plan.weight))
    return {
        "dense": list(dense), "shape": list(shape), "block": block, "sparsity": sparsity,
        "flops": shape[0] * shape[1] * (1 - sparsity) / (dense[0] * dense[1]),
        "forward": forward / base, "dX": backward / base, "dW": weight / base,
        "total": (forward + backward + weight) / (3 * base),
        "masked": other / base, "sparse_products": sparse,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="*", default=[128, 64, 32, 16])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32", "tf32"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/triton_sm90.json")
    args = parser.parse_args()
    rows = []
    print(f"{'kernel':<17}{'dtype':<10}{'block':>5} {'tile':<24}", end="")
    print(*(f"{name:>9}" for name in Compiled.__dataclass_fields__), sep="")
    for name in args.dtypes:
        dtype, precision = (torch.float32, "tf32") if name == "tf32" else (TYPES_BY[name], "ieee")
        todo = [(b, call) for b in args.blocks for call in calls((b, b), dtype, precision)]
        if name != "tf32":
            todo += [(0, call) for call in element_wise(dtype)]
        for block, (kernel, tile, call) in todo:
            made = asdict(compile_call(call))
            shown = "" if tile is None else f"{tile.rows}x{tile.depth} {tile.warps}w {tile.stages}s"
            print(f"{kernel:<17}{name:<10}{block or '':>5} {shown:<24}", end="")
            print(*(f"{value:>9}" for value in made.values()), sep="", flush=True)
            rows.append(
                {"kernel": kernel, "dtype": name, "block": block or None}
                | {"tile": None if tile is None else asdict(tile)} | made
            )  # fmt: skip
    print("\nPREDICTED by the model of an H200, not measured: times over the dense layer's, bf16, ")
    print(f"{TOKENS} tokens; `masked`: the same model's time of a masked dense layer")
    predicted = [
        model(shape, dense, block, sparsity)
        for dense, widened in LAYERS.items()
        for block in args.blocks
        for sparsity, shape in widened.items()
    ]
    for row in predicted:
        times = " ".join(f"{key} {row[key]:.2f}" for key in ("forward", "dX", "dW", "total"))
        print(
            f"{row['dense']} -> {row['shape']} {row['sparsity']:.0%} block {row['block']:>3}: "
            f"{times}  masked {row['masked']:.2f}  FLOPs {row['flops']:.2f}"
        )
    setting = {
        "target": "sm_90", "triton": version("triton"), "torch": torch.__version__,
        "tokens": TOKENS, "measured": "machine code only; no kernel ran and no time was taken",
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"setting": setting, "compiled": rows, "predicted": predicted}, indent=1) + "\n"
    )
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
