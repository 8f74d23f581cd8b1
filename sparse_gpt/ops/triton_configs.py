"""Which tiles the Triton kernels use, and where a dense product is quicker: a cost model.

Nothing is measured at run time: ranks that took different tiles would sum in different orders. The
choice is arithmetic on the device's compute capability, the dtype and the shapes, the same on every
rank. The ceilings and tiles come from data sheets, from the H200 figures quoted beside them and
from what the compiler says of each kernel; **none was tuned on a device**. Importing this needs no
triton.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

logger = logging.getLogger(__name__)

LAUNCH = 3e-6  # seconds a kernel costs besides its work
SPLITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Device:
    """Ceilings: tensor cores (16-bit, tf32) and fp32 units in FLOP/s, L2 and HBM in byte/s.

    `shared`: bytes of shared memory a program may use; `processors`: streaming multiprocessors.
    """

    name: str
    half: float
    tf32: float
    single: float
    l2: float
    hbm: float
    processors: int
    shared: int


# By compute capability. 9.0: 790 TFLOP/s and 4.3 TB/s were seen on an H200, the L2 is assumed; the
# others scale data sheets by as much. Only ratios matter to a choice.
DEVICES = {
    (8, 0): Device("A100", 250e12, 125e12, 15e12, 4.5e12, 1.4e12, 108, 163 << 10),
    (8, 6): Device("A40, L40", 120e12, 60e12, 28e12, 3e12, 0.7e12, 84, 99 << 10),
    (9, 0): Device("H100, H200", 790e12, 395e12, 50e12, 8e12, 4.3e12, 132, 227 << 10),
    (12, 0): Device("RTX Blackwell", 300e12, 150e12, 80e12, 6e12, 1.4e12, 170, 99 << 10),
}


@dataclass(frozen=True)
class Tile:
    """One way to run a kernel.

    `rows`: of its output tile; tokens for dsd, gathered features for sdd and score. `depth`: how
    far one step sums. `stages`: steps whose operands are in shared memory at a time.
    """

    rows: int
    depth: int
    warps: int
    stages: int


# For at most 128 columns. The compiler keeps the sums of each in registers without spilling
# (benchmarks/triton_aot.py).
HALF = (Tile(256, 64, 8, 4), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 32, 4, 3))
SINGLE = (Tile(64, 32, 4, 2),)
SINGLE_TALL = (Tile(128, 32, 8, 2),)  # for dW of blocks of that many columns; dsd would spill


@dataclass(frozen=True)
class Problem:
    """A product with a sparse weight: what a choice is made from."""

    shape: tuple[int, int]  # of the weight: out, in
    block: tuple[int, int]
    slots: int
    tokens: int
    dtype: torch.dtype
    precision: str = "ieee"  # of fp32 products: "ieee" or "tf32"
    capability: tuple[int, int] = (9, 0)

    @property
    def device(self) -> Device:
        return DEVICES[max(known for known in DEVICES if known <= max(self.capability, (8, 0)))]

    @property
    def peak(self) -> float:
        """FLOP/s of products of this dtype."""
        if self.dtype != torch.float32:
            return self.device.half
        return self.device.tf32 if self.precision == "tf32" else self.device.single

    @property
    def dsd_tiles(self) -> tuple[Tile, ...]:
        return SINGLE if self.dtype == torch.float32 else HALF

    @property
    def sdd_tiles(self) -> tuple[Tile, ...]:
        """Of dW, and of the norms of its blocks: they hold a block at least."""
        every = SINGLE + SINGLE_TALL if self.dtype == torch.float32 else HALF
        return tuple(tile for tile in every if tile.rows >= self.block[1])


@dataclass(frozen=True)
class Plan:
    """How the three products of one layer run; None: scattered to a dense weight, a dense product.

    `split`: parts that the tokens are cut into for dW, where there are few blocks. `score`: of
    norms of all blocks of dW; None: they are made of a dense dW.
    """

    forward: Tile | None
    backward: Tile | None
    weight: Tile | None
    split: int = 1
    score: Tile | None = None


Choose = Callable[[Problem], Plan]


def dsd_seconds(problem: Problem, tile: Tile, transposed: bool = False) -> float:
    """Predicted time of forward, or of dX (`transposed`)."""
    width, inner = problem.block[::-1] if transposed else problem.block
    features = problem.shape[1] if transposed else problem.shape[0]
    tall = math.ceil(problem.tokens / tile.rows)
    size = problem.dtype.itemsize
    work = 2 * tall * tile.rows * problem.slots * width * inner
    read = tall * problem.slots * inner * (tile.rows + width) * size
    written = problem.tokens * features * size
    programs = tall * (features // width)
    return _seconds(problem, work, read + written, programs, _least_bytes(problem))


def sdd_seconds(problem: Problem, tile: Tile, split: int) -> float:
    """Predicted time of dW."""
    b_out, b_in = problem.block
    group = group_of(tile, b_in)
    rows = problem.shape[0] // b_out
    # A row's last group is half full on average.
    groups = min(problem.slots / group + rows / 2, problem.slots) if group > 1 else problem.slots
    size = problem.dtype.itemsize
    work = 2 * problem.tokens * groups * group * b_out * b_in
    read = groups * problem.tokens * (group * b_in + b_out) * size
    partial = 8 * split * problem.slots * b_out * b_in if split > 1 else 0
    least = _least_bytes(problem) + partial
    return _seconds(problem, work, read + partial, groups * split, least) + LAUNCH * (split > 1)


def dense_seconds(problem: Problem, moved: bool = True) -> float:
    """Predicted time of one dense product, with what makes the weight of the values (`moved`)."""
    out, inner = problem.shape
    size = problem.dtype.itemsize
    # The library's tiles of 128 x 256 are assumed, and its splits where there are few.
    read = problem.tokens * out * inner * size * (1 / 128 + 1 / 256)
    least = (problem.tokens * (out + inner) + out * inner) * size
    work = 2 * problem.tokens * out * inner
    programs = math.ceil(problem.tokens / 128) * math.ceil(out / 256)
    seconds = _seconds(problem, work, read, max(programs, problem.device.processors), least)
    if moved:
        values = problem.slots * problem.block[0] * problem.block[1]
        seconds += 2 * LAUNCH + (out * inner + 2 * values) * size / problem.device.hbm
    return seconds


def group_of(tile: Tile, b_in: int) -> int:
    """Blocks of one row that an sdd program makes."""
    return max(1, tile.rows // b_in)


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem) -> Plan:
    """The plan that the model says is quickest; said in the log."""
    if problem.block == (1, 1):
        # Tensor cores cannot skip single weights: dense is the floor.
        return Plan(None, None, None)
    dense = dense_seconds(problem)
    plan = sparse_only(problem)
    forward, backward, weight = plan.forward, plan.backward, plan.weight
    assert forward is not None and backward is not None and weight is not None
    if dsd_seconds(problem, forward) > dense:
        plan = replace(plan, forward=None)
    if dsd_seconds(problem, backward, True) > dense:
        plan = replace(plan, backward=None)
    if sdd_seconds(problem, weight, plan.split) > dense:
        plan = replace(plan, weight=None, score=None)  # dW is there, dense
    logger.info(
        "block_triton: a model of %s, not measured, takes for %d x %d with %d blocks of %d x %d "
        "and %d tokens: forward %s, dX %s, dW %s",
        *(problem.device.name, *problem.shape, problem.slots, *problem.block, problem.tokens),
        *(way or "dense" for way in (plan.forward, plan.backward, plan.weight)),
    )
    return plan


def sparse_only(problem: Problem) -> Plan:
    """The quickest plan without dense products."""
    b_out, b_in = problem.block
    forward = [tile for tile in problem.dsd_tiles if _fits(problem, tile, b_out)]
    backward = [tile for tile in problem.dsd_tiles if _fits(problem, tile, b_in)]
    outer = [tile for tile in problem.sdd_tiles if _fits(problem, tile, b_out)]
    ways = [(tile, split) for tile in outer for split in SPLITS]
    columns = score_columns(b_out, problem.dtype)
    weight, split = min(ways, key=lambda way: sdd_seconds(problem, *way))
    return Plan(
        min(forward, key=lambda tile: dsd_seconds(problem, tile)),
        min(backward, key=lambda tile: dsd_seconds(problem, tile, True)),
        weight,
        split,
        next(tile for tile in problem.sdd_tiles if _fits(problem, tile, columns)),
    )


def score_columns(b_out: int, dtype: torch.dtype) -> int:
    """Output features of one program of score."""
    return max(b_out, 64 if dtype == torch.float32 else 128)


def _seconds(
    problem: Problem, work: float, moved: float, programs: float, least_bytes: float
) -> float:
    """The slowest of arithmetic, L2 and HBM; the last wave of programs may not be full."""
    device = problem.device
    waves = max(1.0, programs) / device.processors
    fill = waves / math.ceil(waves)
    inside = max(work / problem.peak, moved / device.l2) / fill
    return max(inside, least_bytes / device.hbm) + LAUNCH


def _least_bytes(problem: Problem) -> int:
    values = problem.slots * problem.block[0] * problem.block[1]
    return (problem.tokens * sum(problem.shape) + values) * problem.dtype.itemsize


def _fits(problem: Problem, tile: Tile, columns: int) -> bool:
    """Whether the stages of both operands fit the shared memory."""
    stage = (tile.rows + columns) * tile.depth * problem.dtype.itemsize
    return tile.stages * stage + 1024 <= problem.device.shared  # and the indices of blocks
