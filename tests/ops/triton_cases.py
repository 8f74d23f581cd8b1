"""`block_triton` against the reference: in the process of `interpreter.py`, or on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.ops import COMPACT, BlockLayout, Growth, Operand
from sparse_gpt.ops.triton_configs import Choose, Plan, Problem, choose, sparse_only


@dataclass(frozen=True)
class Case:
    """Sparse layers of one input. `plan`: sparse, dense, model (as it would be) or given."""

    block: tuple[int, int]
    grid: tuple[int, int]
    tokens: tuple[int, ...] = (33,)
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    operands: int = 1
    share: float = 0.5
    bias: bool = True
    growth: str | None = None
    wanted: tuple[str, ...] = ("x", "values", "bias")
    used: int | None = None  # operands whose results are used; None: all
    strided: bool = False
    plan: str | Plan = "sparse"
    device: str = "cpu"
    seed: int = 0


def chooser(plan: str | Plan) -> Choose:
    if isinstance(plan, Plan):
        return lambda problem: plan
    ways: dict[str, Choose] = {"sparse": _sparse, "dense": _dense, "model": choose}
    return ways[plan]


def _dense(problem: Problem) -> Plan:
    return Plan(None, None, None)


def _sparse(problem: Problem) -> Plan:
    return _dense(problem) if problem.block == (1, 1) else sparse_only(problem)


def active_blocks(case: Case, generator: torch.Generator) -> Tensor:
    """Canonical indices in random order; row 0 and the last column are empty if there are more."""
    active = torch.rand(case.grid, generator=generator) < case.share
    if 0 < case.share < 1:
        active[0] = active[0] & (case.grid[0] == 1)
        active[:, -1] = active[:, -1] & (case.grid[1] == 1)
    canonical = active.flatten().nonzero().view(-1)
    return canonical[torch.randperm(canonical.numel(), generator=generator)]


def results(case: Case, kernel: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that a kernel makes of a case: outputs, gradients and growth by name."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        # Rounded to the case's dtype, whatever the reference computes in.
        made = torch.randn(shape, generator=generator).to(case.dtype)
        return made.to(dtype=dtype, device=case.device)

    shape = (case.grid[0] * case.block[0], case.grid[1] * case.block[1])
    x = normal(*case.tokens, shape[1])
    if case.strided:
        x = torch.cat([x, x], -1)[..., : shape[1]]
    x.requires_grad_("x" in case.wanted)
    grown: dict[str, Tensor] = {}
    operands, gradients = [], []
    for i in range(case.operands):
        slots = active_blocks(case, generator)
        layout = BlockLayout(shape, case.block, slots.to(case.device))
        values = normal(layout.count, *case.block).requires_grad_("values" in case.wanted)
        bias = normal(shape[0]).requires_grad_("bias" in case.wanted) if case.bias else None
        growth = None
        if case.growth is not None:

            def keep(gradient: Tensor, i: int = i) -> None:
                grown[f"growth {i}"] = gradient.clone()

            growth = Growth(case.growth, keep)  # type: ignore[arg-type]
        operands.append(Operand(values, bias, layout, growth))
        gradients.append(normal(*case.tokens, shape[0]))
    made = kernel(x, operands, case.activation)
    found = {f"y {i}": y.detach() for i, y in enumerate(made)}
    pairs = [
        (y, dy) for y, dy in list(zip(made, gradients, strict=True))[: case.used] if y.requires_grad
    ]
    assert all(y.requires_grad == bool(case.wanted) for y in made)
    if pairs:
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    leaves = {"x": x}
    for i, operand in enumerate(operands):
        leaves[f"values {i}"] = operand.values
        if operand.bias is not None:
            leaves[f"bias {i}"] = operand.bias
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found | grown


def errors(case: Case) -> dict[str, float]:
    """Relative errors (L2) of all results of a case against the reference in fp32."""
    from sparse_gpt.ops import block_triton

    def kernel(x: Tensor, operands: Sequence[Operand], activation: str | None) -> Any:
        return block_triton.sparse_linears(x, operands, activation, chooser(case.plan))

    got = results(case, kernel, case.dtype)
    wanted = results(case, COMPACT["reference"], torch.float32)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.shape == wanted[name].shape, name
        expected = torch.float32 if name.startswith("growth") else case.dtype
        assert case.growth == "dense" or tensor.dtype == expected, name
    return {name: relative(got[name], wanted[name]) for name in got}


def relative(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted.double()).norm()
    return float(difference / wanted.double().norm()) if float(difference) else 0.0


def rewritten(device: str = "cpu") -> tuple[float, str]:
    """(error behind a rewrite of the topology, what a stale backward pass says)."""
    from sparse_gpt.ops import block_triton

    layout = BlockLayout((64, 48), (16, 16), torch.tensor([1, 5, 11], device=device))
    values = torch.randn(3, 16, 16, device=device, requires_grad=True)
    x = torch.randn(20, 48, device=device)
    operand = Operand(values, None, layout)
    (y,) = block_triton.sparse_linears(x, [operand], choose=_sparse)
    layout.rewrite(torch.tensor([1, 3, 0], device=device))
    message = ""
    try:
        y.sum().backward()
    except RuntimeError as error:
        message = str(error)
    (y,) = block_triton.sparse_linears(x, [operand], choose=_sparse)
    (wanted,) = COMPACT["reference"](x, [operand], None)
    return relative(y.detach(), wanted.detach()), message


def far_apart(path: str) -> float:
    """Error for tokens so far from each other that offsets, and those of 32 tokens, pass 2^31."""
    from sparse_gpt.ops import block_triton

    tokens, stride = 70, 2**26
    size = (tokens - 1) * stride + 64
    storage = torch.from_file(path, shared=True, size=size, dtype=torch.float32)
    x = storage.as_strided((tokens, 64), (stride, 1))
    x.copy_(torch.randn(tokens, 64))
    layout = BlockLayout((64, 64), (32, 32), torch.tensor([1, 2]))
    results = []
    for kernel in (
        COMPACT["reference"],
        lambda *inputs: block_triton.sparse_linears(*inputs, choose=_sparse),
    ):
        values = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
        values.requires_grad_()
        (y,) = kernel(x, [Operand(values, None, layout)], None)
        y.backward(torch.arange(64.0 * tokens).view(tokens, 64))
        results.append((y.detach(), values.grad))
    return max(relative(got, wanted) for wanted, got in zip(*results, strict=True))


def compiled_graph_breaks(device: str = "cpu") -> tuple[float, int]:
    """(error, graphs) of `torch.compile` around a function with a kernel in its middle."""
    from sparse_gpt.ops import block_triton

    layout = BlockLayout((32, 48), (16, 16), torch.tensor([1, 5, 3], device=device))
    values = torch.randn(3, 16, 16, device=device, requires_grad=True)
    x = torch.randn(20, 48, device=device)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def function(x: Tensor) -> Tensor:
        (y,) = block_triton.sparse_linears(
            2 * x, [Operand(values, None, layout)], None, choose=_sparse
        )
        return y.relu()

    got = torch.compile(function, backend=backend)(x)
    got.sum().backward()
    gradient = values.grad
    values.grad = None
    wanted = function(x)
    wanted.sum().backward()
    assert gradient is not None and values.grad is not None
    return relative(got, wanted) + relative(gradient, values.grad), len(graphs)
