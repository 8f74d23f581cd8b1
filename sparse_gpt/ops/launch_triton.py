"""Calls of the Triton kernels: grid, arguments and options. It imports triton: import it lazily."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from sparse_gpt.ops import kernels_triton as kernels
from sparse_gpt.ops.layout import BlockLayout
from sparse_gpt.ops.triton_configs import Tile, group_of, score_columns

MOST_WEIGHTS = 3  # that dsd sums in one call
BAND = 8  # tiles of tokens that share blocks in L2
ACTIVATION_TOKENS = 64  # of a tile of activation_backward


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET=1` was set before triton was imported: numpy runs the kernels."""
    return bool(knobs.runtime.interpret)


@dataclass(frozen=True)
class Call:
    """A kernel and all that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    def launch(self) -> None:
        if 0 in self.grid:
            return
        if interpreting():
            self._interpret()
            return
        device = next(t.device for t in self.arguments.values() if isinstance(t, Tensor))
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        # Fusion is triton's default until 3.10, which drops it.
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }

    def _interpret(self) -> None:
        """16-bit tensors go in and out as fp32: numpy has no bfloat16, and Triton's is unsound."""
        short = {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        }
        widened = {name: value.float() for name, value in short.items()}
        self.kernel[self.grid](**(self.arguments | widened))
        for name, value in short.items():
            value.copy_(widened[name])


@dataclass(frozen=True)
class Weight:
    """A block-sparse weight with what it is multiplied by, `[tokens, features]`."""

    inputs: Tensor
    values: Tensor
    layout: BlockLayout


def dsd(
    weights: Sequence[Weight],
    output: Tensor,
    tile: Tile,
    precision: str,
    transposed: bool = False,
    partial: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    before: Tensor | None = None,
) -> Call:
    """Forward of one weight, or the sum of dX of up to three (`transposed`), into `output`."""
    b_out, b_in = weights[0].layout.block
    width, inner = (b_in, b_out) if transposed else (b_out, b_in)
    tokens, majors = output.shape[0], output.shape[1] // width
    arguments: dict[str, Any] = {}
    for place in range(MOST_WEIGHTS):
        fields: tuple[Any, ...] = (None,) * 6
        if place < len(weights):
            weight, layout = weights[place], weights[place].layout
            views = (layout.row_ptr, layout.row_slot, layout.col_idx)
            if transposed:
                views = (layout.col_ptr, layout.col_slot, layout.row_idx)
            fields = (weight.inputs, weight.inputs.stride(0), weight.values, *views)
        names = ("inputs", "stride", "values", "pointers", "slots", "minors")
        arguments |= {f"{name}{place}": field for name, field in zip(names, fields, strict=True)}
    arguments |= {
        "partial": partial, "bias": bias, "before": before, "output": output,
        "tokens": tokens, "majors": majors,
        "WIDTH": width, "INNER": inner, "TRANSPOSED": transposed, "ACTIVATION": activation,
        "TOKENS": tile.rows, "DEPTH": min(tile.depth, inner), "BAND": BAND, "PRECISION": precision,
    }  # fmt: skip
    grid = (math.ceil(tokens / tile.rows) * majors,)
    # Triton halves them: where a block lies is loaded as far ahead of it as it of its product.
    return Call(kernels.dsd, grid, arguments, tile.warps, 2 * tile.stages - 1)


def sdd(
    gradient: Tensor,
    inputs: Tensor,
    layout: BlockLayout,
    output: Tensor,
    tile: Tile,
    precision: str,
) -> Call:
    """dW by slots into `output [parts, slots, b_out, b_in]`, each part of some of the tokens."""
    b_out, b_in = layout.block
    rows, tokens, parts = layout.grid[0], inputs.shape[0], output.shape[0]
    group = group_of(tile, b_in)
    chunk = math.ceil(tokens / (parts * tile.depth)) * tile.depth
    arguments = {
        "gradient": gradient, "gradient_stride": gradient.stride(0),
        "inputs": inputs, "inputs_stride": inputs.stride(0), "output": output,
        "row_ptr": layout.row_ptr, "row_slot": layout.row_slot, "col_idx": layout.col_idx,
        "tokens": tokens, "chunk": chunk, "block_rows": rows, "total": layout.count,
        "OUT": b_out, "IN": b_in, "GROUP": group, "SEARCH": rows.bit_length(),
        "DEPTH": tile.depth, "PRECISION": precision,
    }  # fmt: skip
    grid = (rows + layout.count // group if layout.count else 0, parts)
    return Call(kernels.sdd, grid, arguments, tile.warps, tile.stages)


def score(
    gradient: Tensor,
    inputs: Tensor,
    block: tuple[int, int],
    output: Tensor,
    tile: Tile,
    precision: str,
) -> Call:
    """Squared norms of the blocks of dW into `output`, fp32 `[rows, columns]` of the grid."""
    b_out, b_in = block
    outs = score_columns(b_out, inputs.dtype)
    out_features, in_features = gradient.shape[1], inputs.shape[1]
    arguments = {
        "gradient": gradient, "gradient_stride": gradient.stride(0),
        "inputs": inputs, "inputs_stride": inputs.stride(0), "output": output,
        "tokens": inputs.shape[0], "out_features": out_features, "in_features": in_features,
        "OUT": b_out, "IN": b_in, "OUTS": outs, "INS": tile.rows,
        "DEPTH": tile.depth, "PRECISION": precision,
    }  # fmt: skip
    grid = (math.ceil(in_features / tile.rows) * math.ceil(out_features / outs),)
    return Call(kernels.score, grid, arguments, tile.warps, tile.stages)


def activation_backward(
    gradient: Tensor, before: Tensor, activation: str, output: Tensor, bias_sums: Tensor | None
) -> Call:
    """dZ of dY and Z into `output`; column sums of tiles of tokens into `bias_sums`."""
    tokens, features = before.shape
    width = 128
    arguments = {
        "gradient": gradient, "before": before, "output": output, "bias_sums": bias_sums,
        "tokens": tokens, "features": features,
        "ACTIVATION": activation, "TOKENS": ACTIVATION_TOKENS, "WIDTH": width,
    }  # fmt: skip
    grid = (math.ceil(tokens / ACTIVATION_TOKENS), math.ceil(features / width))
    return Call(kernels.activation_backward, grid, arguments)


def move(weight: Tensor, values: Tensor, layout: BlockLayout, scatter: bool) -> Call:
    """Between values and a dense `[out, in]` weight; the rest of the weight stays as it is."""
    b_out, b_in = layout.block
    arguments = {
        "weight": weight, "values": values, "slots": layout.slots,
        "in_features": layout.shape[1], "total": values.numel(),
        "OUT": b_out, "IN": b_in, "SCATTER": scatter, "TILE": 1024,
    }  # fmt: skip
    return Call(kernels.move, (math.ceil(values.numel() / 1024),), arguments)
