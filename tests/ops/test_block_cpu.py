"""The C++ kernel over compact storage against the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.errors import UserError
from sparse_gpt.native import library
from sparse_gpt.ops import COMPACT, BlockLayout, Growth, Operand, block_cpu, resolve_compact
from sparse_gpt.ops.dispatch import why_not

ROOT = Path(__file__).resolve().parents[2]
KERNEL, REFERENCE = COMPACT["block_cpu"], COMPACT["reference"]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# Of the whole result, against fp64: what issue and contract 7 ask for.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
BLOCKS = [(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128)]
OBLONG = [(1, 4), (4, 1), (16, 1), (1, 16), (8, 4), (3, 5), (6, 2), (16, 32), (48, 16), (64, 32)]

pytestmark = pytest.mark.skipif(
    library(block_cpu.SOURCE) is None, reason="no native kernels: no C++ compiler"
)


def random_layout(grid, block, share, generator) -> BlockLayout:
    active = torch.rand(grid, generator=generator) < share
    canonical = active.flatten().nonzero().view(-1)
    order = torch.randperm(canonical.numel(), generator=generator)
    return BlockLayout((grid[0] * block[0], grid[1] * block[1]), block, canonical[order])


def problem(layouts, tokens, dtype, seed=0):
    """x, and a (values, bias, dy) of each layout."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    x = random(tokens, layouts[0].shape[1])
    return x, [
        (random(y.count, *y.block), random(y.shape[0]), random(tokens, y.shape[0])) for y in layouts
    ]


def outcome(kernel, x, weights, layouts, activation, dtype):
    """y of each, dx, and dW and db of each."""
    x = x.detach().to(dtype).requires_grad_()
    leaves = [[t.detach().to(dtype).requires_grad_() for t in (v, b)] for v, b, _ in weights]
    operands = [Operand(v, b, layout) for (v, b), layout in zip(leaves, layouts, strict=True)]
    results = kernel(x, operands, activation)
    torch.autograd.backward(results, [dy.to(dtype) for _, _, dy in weights])
    return [y.detach() for y in results], x.grad, *[t.grad for leaf in leaves for t in leaf]


def flat(nested):
    for item in nested:
        yield from flat(item) if isinstance(item, (list, tuple)) else [item]


def check(x, weights, layouts, activation):
    dtype = x.dtype
    mine = outcome(KERNEL, x, weights, layouts, activation, dtype)
    right = outcome(REFERENCE, x, weights, layouts, activation, torch.float64)
    for got, expected in zip(flat(mine), flat(right), strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        error = (got.double() - expected).norm()
        assert error <= BOUNDS[dtype] * expected.norm(), (dtype, activation, x.shape)


@pytest.fixture(params=["by itself", "in pairs"])
def lanes(request, monkeypatch):
    """How bf16 is multiplied: as this CPU does, or in pairs, perhaps by what stands for it."""
    if request.param == "in pairs":
        monkeypatch.setattr(block_cpu, "_multiplies_pairs", lambda: True)
    return request.param


@pytest.mark.parametrize("block", BLOCKS + OBLONG)
def test_forward_and_gradients_are_the_references(block, lanes):
    generator = torch.Generator().manual_seed(1)
    grid = (max(3, 96 // block[0]), max(5, 160 // block[1]))
    layout = random_layout(grid, block, 0.3, generator)
    for dtype in DTYPES if lanes == "by itself" else DTYPES[1:]:
        for tokens, activation in ((1, None), (17, "gelu"), (64, None), (131, "gelu_new")):
            x, weights = problem([layout], tokens, dtype)
            check(x, weights, [layout], activation)


@settings(deadline=None, max_examples=60)
@given(
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    share=st.floats(0, 1),
    tokens=st.integers(0, 140),
    half=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape_is_right(block, grid, share, tokens, half, seed):
    """Empty block rows and columns, one block, no block, one token, no token.

    Without an activation: a slope that happens to be near 0 has no relative error to speak of.
    """
    layout = random_layout(grid, block, share, torch.Generator().manual_seed(seed))
    x, weights = problem([layout], tokens, DTYPES[half], seed)
    check(x, weights, [layout], None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bands_of_columns_and_parts_of_tokens_are_right(dtype, lanes):
    """Wider than a band of each pass, more tokens than one sum runs through, ranges of rows."""
    generator = torch.Generator().manual_seed(2)
    grids = {(4, 4): (300, 400), (16, 16): (70, 80), (1, 1): (40, 1300)}
    more = (((1, 1), (2600, 70)), ((16, 16), (164, 9)), ((16, 16), (9, 164)))
    for block, grid in (*grids.items(), *more):
        layout = random_layout(grid, block, 0.05, generator)
        x, weights = problem([layout], 1100, dtype)
        check(x, weights, [layout], None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(4, 4), (16, 32), (32, 32), (1, 4)])
def test_more_tokens_than_are_packed_at_once_are_right(block, dtype, lanes):
    """Gradients then lie in scratch memory from one part of the tokens to the next."""
    generator = torch.Generator().manual_seed(3)
    layout = random_layout((4096 // block[0], 256 // block[1]), block, 0.05, generator)
    x, weights = problem([layout], 1100, dtype)
    check(x, weights, [layout], None)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [(4, 4), (16, 16), (32, 32), (64, 64), (4, 1)])
def test_few_tokens_meet_weights_that_are_put_in_order_for_them(block, threads, lanes):
    generator = torch.Generator().manual_seed(4)
    layout = random_layout((2048 // block[0], 1536 // block[1]), block, 0.1, generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for tokens in (40, 200, 256, 257):
            x, weights = problem([layout], tokens, torch.bfloat16)
            check(x, weights, [layout], "gelu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_forked_process_computes_with_threads_of_its_own():
    """torch's threads are not in a child, and waiting for them would never end."""
    script = """
import os, signal, sys, warnings, torch
from sparse_gpt.ops import BlockLayout, Operand, block_cpu
torch.set_num_threads(2)
layout = BlockLayout((1024, 1024), (16, 16), torch.arange(0, 4096, 3))
values, x = torch.randn(layout.count, 16, 16), torch.randn(512, 1024)
compute = lambda: block_cpu.sparse_linears(x, [Operand(values, None, layout)])[0]
right = compute()
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends it if it waits
    found = compute()
    torch.set_num_threads(1)  # torch's own operations would wait
    os._exit(0 if torch.equal(found, right) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_input_share_a_call(dtype):
    generator = torch.Generator().manual_seed(3)
    layouts = [random_layout((rows, 8), (8, 4), 0.4, generator) for rows in (4, 2, 9)]
    layouts.append(random_layout((8, 4), (4, 8), 0.4, generator))
    wide = [random_layout((rows, 5), (16, 32), 0.4, generator) for rows in (6, 3, 7)]
    for some in (layouts[:3], layouts, wide):  # of one block, not, of panels
        x, weights = problem(some, 70, dtype)
        check(x, weights, some, "gelu")


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (1, 1)])
def test_results_do_not_depend_on_threads_or_the_run(block):
    generator = torch.Generator().manual_seed(4)
    layouts = [random_layout((160 // block[0], 96 // block[1]), block, 0.3, generator)] * 2
    threads, seen = torch.get_num_threads(), []
    try:
        for dtype in DTYPES:
            x, weights = problem(layouts, 650, dtype)  # few in the last tile
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                results = flat(outcome(KERNEL, x, weights, layouts, "gelu", dtype))
                seen.append(list(results))
            for other in seen[1:]:
                assert all(map(torch.equal, seen[0], other))
            seen.clear()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("needed", range(8))
def test_only_gradients_that_are_asked_for_are_made(needed):
    layout = random_layout((4, 4), (4, 4), 0.5, torch.Generator().manual_seed(5))
    x, [(values, bias, dy)] = problem([layout], 9, torch.float32)
    expected = outcome(REFERENCE, x, [(values, bias, dy)], [layout], "gelu", torch.float32)[1:]
    leaves = [
        t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate((x, values, bias))
    ]
    (y,) = KERNEL(leaves[0], [Operand(leaves[1], leaves[2], layout)], "gelu")
    assert y.requires_grad == bool(needed)
    if needed:
        y.backward(dy)
    for leaf, right in zip(leaves, expected, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, right, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("biased", [False, True])
def test_inputs_of_any_shape_and_stride(biased):
    layout = random_layout((6, 4), (4, 4), 0.5, torch.Generator().manual_seed(6))
    wide = torch.randn(5, 32, 3, generator=torch.Generator().manual_seed(6))
    x = wide[:, ::2].transpose(1, 2).requires_grad_()
    values = torch.randn(4, 4, layout.count).permute(2, 1, 0).requires_grad_()
    bias = torch.randn(48)[::2] if biased else None
    results = []
    for kernel in (KERNEL, REFERENCE):
        (y,) = kernel(x, [Operand(values, bias, layout)], None)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, values))])  # dy of stride 0
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_activations_and_their_slopes_are_right_everywhere(activation):
    layout = BlockLayout((1, 1), (1, 1), torch.tensor([0]))
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, 1e30, 0.0])])[:, None]
    one = torch.ones(1, 1, 1)
    results = []
    for kernel, dtype in ((KERNEL, torch.float32), (REFERENCE, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        (y,) = kernel(leaf, [Operand(one.to(dtype), None, layout)], activation)
        results.append([y.detach().double(), torch.autograd.grad(y.sum(), leaf)[0].double()])
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)


def test_without_gradients_nothing_is_kept():
    layout = random_layout((6, 4), (4, 4), 0.5, torch.Generator().manual_seed(6))
    values, x = torch.randn(layout.count, 4, 4, requires_grad=True), torch.randn(3, 16)
    with torch.no_grad():
        (y,) = KERNEL(x, [Operand(values, None, layout)], "gelu")
    assert not y.requires_grad


def test_checkpointed_layers_are_run_again():
    from torch.utils.checkpoint import checkpoint

    layout = random_layout((6, 4), (4, 4), 0.5, torch.Generator().manual_seed(6))
    values, x = torch.randn(layout.count, 4, 4, requires_grad=True), torch.randn(3, 16)

    def layer(x):
        return KERNEL(x, [Operand(values, None, layout)], "gelu")[0]

    (plain,) = torch.autograd.grad(layer(x).sum(), values)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), values)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["dense", "norms"])
def test_growth_gets_what_the_reference_gives(kind):
    layout = random_layout((6, 4), (4, 8), 0.5, torch.Generator().manual_seed(7))
    x, [(values, bias, dy)] = problem([layout], 9, torch.float32)
    given = []
    for kernel in (KERNEL, REFERENCE):
        growth = Growth(kind, lambda found: given.append(found.clone()))
        leaf = values.clone().requires_grad_()
        (y,) = kernel(x, [Operand(leaf, bias, layout, growth)], "gelu_new")
        y.backward(dy)
    torch.testing.assert_close(*given, rtol=1e-4, atol=1e-4)


def test_weights_that_change_in_place_and_topologies_are_seen():
    layout = random_layout((6, 4), (4, 4), 0.5, torch.Generator().manual_seed(8))
    values, x = torch.randn(layout.count, 4, 4, requires_grad=True), torch.randn(3, 16)
    operands = [Operand(values, None, layout)]
    (y,) = KERNEL(x, operands, None)
    values.data.mul_(2)
    assert torch.equal(KERNEL(x, operands, None)[0], 2 * y)
    (y,) = KERNEL(x, operands, None)
    free = torch.tensor(sorted({*range(24)} - {*layout.slots.tolist()}))
    layout.rewrite(torch.cat([layout.slots[len(free) :], free])[: layout.count])
    with pytest.raises(RuntimeError, match="topology changed between"):
        y.sum().backward()
    torch.testing.assert_close(KERNEL(x, operands, None)[0], REFERENCE(x, operands, None)[0])


def test_what_it_cannot_do_is_said(monkeypatch, caplog):
    assert resolve_compact("auto", CPU, (4, 4), torch.float32)[0] == "block_cpu"
    assert "fp32 and bf16" in str(why_not("block_cpu", CPU, (4, 4), torch.float64))
    assert "on cuda" in str(why_not("block_cpu", torch.device("cuda"), (4, 4), torch.float32))
    layout = random_layout((2, 2), (4, 4), 1, torch.Generator())
    with pytest.raises(TypeError, match="float64"):
        KERNEL(torch.ones(1, 8).double(), [Operand(torch.ones(4, 4, 4), None, layout)], None)
    monkeypatch.setattr(block_cpu, "_checked", lambda dtype: False)
    assert "wrong on this CPU" in str(why_not("block_cpu", CPU, (4, 4), torch.float32))
    monkeypatch.setattr(block_cpu, "library", lambda source: None)
    with pytest.raises(UserError, match="block_cpu cannot run here: there is no C\\+\\+ compiler"):
        resolve_compact("block_cpu", CPU, (4, 4), torch.float32)
    with caplog.at_level("INFO"):
        assert resolve_compact("auto", CPU, (4, 4), torch.float32)[0] == "reference"
    assert "no C++ compiler" in caplog.text


def test_a_library_that_computes_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr(
        block_cpu,
        "sparse_linears",
        lambda x, operands, act: (REFERENCE(x, operands, act)[0] * 1.1,),
    )
    block_cpu._checked.cache_clear()
    assert not block_cpu._checked(torch.float32)
    block_cpu._checked.cache_clear()
