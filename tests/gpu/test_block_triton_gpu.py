"""The kernels of GPUs on a GPU: the comparisons of tests/ops, compiled; graphs; 2:4."""

from dataclasses import replace

import pytest
import torch

from sparse_gpt.ops import COMPACT, KERNELS, BlockLayout, Operand, block_triton, semi_structured
from sparse_gpt.ops.triton_configs import HALF, SINGLE, SINGLE_TALL, Plan
from tests.ops import triton_cases
from tests.ops.test_semi_structured import two_of_four
from tests.ops.triton_cases import Case

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def check(case: Case) -> None:
    reason = block_triton.why_not(CUDA, case.block, case.dtype)
    assert reason is None, reason
    found = triton_cases.errors(replace(case, device="cuda"))
    assert max(found.values()) <= TOLERANCE[case.dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block", "activation"),
    [
        ((16, 16), None),
        ((32, 32), "gelu"),
        ((64, 64), "gelu_new"),
        ((128, 128), "gelu"),
        ((16, 128), "gelu_new"),
        ((128, 16), None),
        ((64, 32), "gelu"),
        ((1, 1), "gelu_new"),
    ],
)
def test_blocks(block, activation, dtype):
    grid = (11, 9) if block != (1, 1) else (96, 160)
    for plan in ("sparse", "dense", "model"):
        check(Case(block, grid, (3, 331), dtype, activation, 3, growth="norms", plan=plan))


@pytest.mark.parametrize("tile", [*HALF, *SINGLE, *SINGLE_TALL], ids=str)
def test_shipped_tiles(tile):
    dtype = torch.bfloat16 if tile in HALF else torch.float32
    for block in ((32, 32), (64, 64)):
        for split in (1, 4):
            plan = Plan(tile, tile, tile, split, tile)
            check(Case(block, (7, 12), (777,), dtype, "gelu", plan=plan, growth="norms"))


@pytest.mark.parametrize("tokens", [(0,), (1,), (63,), (64,), (1025,)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_counts_of_tokens_and_blocks(tokens, share):
    check(Case((32, 64), (5, 7), tokens, torch.bfloat16, share=share, growth="norms"))


def test_several_calls_for_one_gradient_of_the_input():
    check(Case((64, 64), (6, 5), (500,), torch.bfloat16, operands=7))


def test_rewritten_topologies():
    error, message = triton_cases.rewritten("cuda")
    assert error <= 1e-5
    assert "topology changed between" in message


def test_compiled_code_breaks_its_graph_around_the_kernel():
    error, graphs = triton_cases.compiled_graph_breaks("cuda")
    assert error <= 1e-5
    assert graphs == 2


@pytest.mark.parametrize("block", [(32, 32), (1, 1)])
def test_a_captured_graph_sees_a_rewritten_topology(block):
    shape, count = (16 * block[0], 12 * block[1]), 60
    generator = torch.Generator().manual_seed(0)

    def slots() -> torch.Tensor:
        return torch.randperm(16 * 12, generator=generator)[:count].to(CUDA)

    layout = BlockLayout(shape, block, slots())
    x = torch.randn(300, shape[1], device=CUDA, requires_grad=True)
    values = torch.randn(count, *block, device=CUDA, requires_grad=True)
    bias = torch.randn(shape[0], device=CUDA, requires_grad=True)
    dy = torch.randn(300, shape[0], device=CUDA)

    def step(kernel) -> list[torch.Tensor]:
        (y,) = kernel(x, [Operand(values, bias, layout)], "gelu")
        return [y, *torch.autograd.grad(y, (x, values, bias), dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(block_triton.sparse_linears)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(block_triton.sparse_linears)
    for _ in range(2):
        layout.rewrite(slots())
        with torch.no_grad():
            for tensor in (x, values, bias, dy):
                tensor.normal_()
        graph.replay()
        for got, wanted in zip(captured, step(COMPACT["reference"]), strict=True):
            assert triton_cases.relative(got, wanted) <= 1e-5


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_of_four(dtype, transposable):
    reason = semi_structured.why_not(CUDA, dtype)
    if reason is not None:
        pytest.skip(reason)
    weight = torch.randn(256, 384)
    pattern = two_of_four(weight, transposable).to(CUDA)
    inputs = [torch.randn(5, 67, 384), weight, torch.randn(256), torch.randn(5, 67, 256)]
    found = []
    for name, kind in (("reference", torch.float32), ("semi_structured", dtype)):
        *leaves, dy = (t.to(dtype).to(device=CUDA, dtype=kind) for t in inputs)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = KERNELS[name](*leaves, pattern)
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*found, strict=True):
        assert triton_cases.relative(got, wanted) <= 1e-2
