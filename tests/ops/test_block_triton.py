"""The Triton kernels in Triton's interpreter against the reference, and who may use them."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.errors import UserError
from sparse_gpt.ops import block_triton, resolve_compact
from sparse_gpt.ops.triton_configs import (
    HALF,
    SINGLE,
    SINGLE_TALL,
    Plan,
    Problem,
    choose,
    dense_seconds,
    dsd_seconds,
)
from tests.ops import triton_cases
from tests.ops.interpreter import Interpreter
from tests.ops.triton_cases import Case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


def check(interpreter: Interpreter, case: Case) -> dict[str, float]:
    found = interpreter(triton_cases.errors, case)
    assert max(found.values()) <= TOLERANCE[case.dtype], found
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("block", "grid", "activation"),
    [
        ((16, 16), (5, 7), "gelu"),
        ((32, 32), (4, 5), "gelu_new"),
        ((64, 64), (3, 3), None),
        ((128, 128), (2, 2), "gelu"),
        ((16, 64), (5, 3), "gelu_new"),
        ((64, 16), (3, 6), None),
        ((128, 32), (2, 3), None),
        ((1, 1), (24, 40), "gelu"),
    ],
)
def test_blocks(interpreter, block, grid, activation, dtype):
    found = check(interpreter, Case(block, grid, (3, 11), dtype, activation, growth="norms"))
    assert set(found) == {"y 0", "d x", "d values 0", "d bias 0", "growth 0"}


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("tile", [*HALF, *SINGLE, *SINGLE_TALL], ids=str)
def test_shipped_tiles(interpreter, tile, split):
    plan = Plan(tile, tile, tile, split, tile)
    case = Case((32, 16), (3, 9), (270,), plan=plan, activation="gelu", growth="norms")
    check(interpreter, case)


@pytest.mark.parametrize("tokens", [(1,), (0,), (1, 1), (64,), (65,), (2, 2, 5)])
def test_counts_of_tokens(interpreter, tokens):
    check(interpreter, Case((16, 16), (3, 4), tokens, activation="gelu", growth="norms"))


@pytest.mark.parametrize("plan", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("grid", "share"), [((1, 1), 1.0), ((3, 2), 0.0), ((2, 3), 1.0), ((1, 9), 0.5), ((9, 1), 0.5)]
)
def test_one_block_none_and_all(interpreter, grid, share, plan):
    check(interpreter, Case((16, 32), grid, share=share, plan=plan, growth="norms", bias=False))


@pytest.mark.parametrize("block", [(16, 16), (1, 1)])
@pytest.mark.parametrize("operands", [2, 3, 7])
def test_several_weights_of_one_input(interpreter, operands, block):
    check(interpreter, Case(block, (4, 3), operands=operands, activation="gelu"))
    # fp32 between calls: seven roundings to bf16 would show.
    found = check(interpreter, Case(block, (4, 3), dtype=torch.bfloat16, operands=operands))
    assert block == (1, 1) or found["d x"] < 3e-3


def test_products_of_which_some_are_dense(interpreter):
    tile = HALF[-1]
    for plan in (Plan(None, tile, None), Plan(tile, None, tile, 2), Plan(None, None, None)):
        check(interpreter, Case((16, 16), (4, 3), operands=4, plan=plan, activation="gelu_new"))


@pytest.mark.parametrize("wanted", [(), ("x",), ("values",), ("bias",), ("x", "bias")])
def test_only_the_gradients_asked_for(interpreter, wanted):
    found = check(interpreter, Case((16, 16), (2, 3), activation="gelu", wanted=wanted, operands=2))
    assert {name.split()[1] for name in found if name.startswith("d ")} == set(wanted)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_result_that_is_not_used(interpreter, activation):
    check(interpreter, Case((16, 16), (2, 3), operands=3, used=2, activation=activation))


def test_input_that_is_not_contiguous(interpreter):
    check(interpreter, Case((16, 16), (3, 4), strided=True))
    check(interpreter, Case((16, 16), (3, 4), (4, 9), strided=True))


@pytest.mark.parametrize("block", [(32, 16), (1, 1)])
@pytest.mark.parametrize("growth", ["norms", "dense"])
@pytest.mark.parametrize("plan", ["sparse", "dense"])
def test_growth(interpreter, growth, plan, block):
    # More than one tile of score, the last ones ragged.
    case = Case(block, (5, 18), growth=growth, plan=plan, operands=2)
    assert "growth 1" in check(interpreter, case)


def test_what_the_model_chooses(interpreter):
    check(interpreter, Case((16, 16), (4, 4), plan="model"))


@settings(max_examples=15, deadline=None)
@given(
    block=st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    tokens=st.integers(1, 150),
    share=st.floats(0, 1),
    tile=st.sampled_from([*HALF, *SINGLE, *SINGLE_TALL]),
    split=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_any_shape(interpreter, block, grid, tokens, share, tile, split, seed):
    plan = Plan(tile, tile, tile, split)
    check(interpreter, Case(block, grid, (tokens,), share=share, plan=plan, seed=seed))


def test_rewritten_topologies(interpreter):
    error, message = interpreter(triton_cases.rewritten)
    assert error <= 1e-5
    assert "topology changed between" in message


def test_offsets_beyond_32_bits(interpreter, tmp_path):
    path = tmp_path / "sparse file"
    assert interpreter(triton_cases.far_apart, str(path)) <= 1e-5
    assert path.stat().st_blocks * 512 < 2**20


def test_compiled_code_breaks_its_graph_around_the_kernel(interpreter):
    error, graphs = interpreter(triton_cases.compiled_graph_breaks)
    assert error <= 1e-5
    assert graphs == 2


def test_without_triton_everything_imports():
    code = (
        "import sys; sys.modules['triton'] = None; "
        "import sparse_gpt.model.gpt, sparse_gpt.ops.block_triton; "
        "sys.exit(sparse_gpt.ops.block_triton.sparse_linears is None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_machine_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert block_triton.why_not(CUDA, (16, 16), torch.bfloat16) == (
        "the package triton is not installed"
    )


def test_who_may_not_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "cc")
    bf16 = torch.bfloat16
    for block in ((16, 16), (128, 32), (1, 1)):
        assert block_triton.why_not(CUDA, block, bf16) is None
    for block in ((8, 8), (4, 4), (16, 8), (48, 48), (256, 256), (1, 16)):
        assert "sparsity.kernel: reference" in (block_triton.why_not(CUDA, block, bf16) or "")
    assert "torch.float64" in (block_triton.why_not(CUDA, (16, 16), torch.float64) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5 is less than 8.0" in (block_triton.why_not(CUDA, (16, 16), bf16) or "")


def test_the_choice_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"block_triton cannot run here: .* the device is cpu"):
        resolve_compact("block_triton", CPU, (16, 16), torch.float32)
    name, _ = resolve_compact("auto", CPU, (16, 16), torch.float32)
    assert name != "block_triton"


def test_the_choice_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "cc")
    caplog.set_level("INFO", logger="sparse_gpt")
    assert resolve_compact("auto", CUDA, (32, 32), torch.bfloat16)[0] == "block_triton"
    assert resolve_compact("auto", CUDA, (8, 8), torch.bfloat16)[0] == "reference"
    assert "block_triton: blocks of 8 x 8: tensor cores need sides of 16" in caplog.text


def problem(block: int, sparsity: float, shape=(6144, 1536), tokens: int = 16384) -> Problem:
    slots = round(shape[0] * shape[1] / block**2 * (1 - sparsity))
    return Problem(shape, (block, block), slots, tokens, torch.bfloat16)


def test_the_model_of_a_hopper_gpu():
    """Blocks of 128 always pay, small ones only where much is skipped, single weights never."""
    for sparsity in (0.5, 0.75, 0.9):
        plan = choose(problem(128, sparsity))
        assert plan.forward and plan.backward and plan.weight
        assert choose(problem(1, sparsity)) == Plan(None, None, None)
    assert choose(problem(16, 0.5)) == Plan(None, None, None)
    assert choose(problem(16, 0.95)).forward is not None
    # The ceilings of the design: 256-token tiles out of 8 TB/s of L2.
    for block, expected in ((128, 683e12), (64, 410e12), (32, 228e12), (16, 120e12)):
        case = problem(block, 0.75, (24576, 6144), 65536)
        rate = 2 * case.tokens * case.slots * block**2 / dsd_seconds(case, HALF[0])
        assert rate == pytest.approx(expected, rel=0.1)
    assert dense_seconds(problem(128, 0.5), moved=False) < dense_seconds(problem(128, 0.5))


def test_the_model_splits_tokens_where_there_are_few_blocks():
    assert choose(problem(128, 0.75, (1536, 1536))).split > 1
    assert choose(problem(128, 0.5, (24576, 6144))).split == 1


def test_tiles_fit_the_shared_memory():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for dtype in (torch.bfloat16, torch.float32):
            plan = choose(
                Problem((6144, 1536), (128, 128), 144, 4096, dtype, capability=capability)
            )
            assert plan.forward is not None
