"""The kernel `block_triton`: Triton over compact storage on NVIDIA GPUs.

Blocks of 16 to 128 are multiplied on tensor cores and what is not active is skipped, where a cost
model says that this is quicker than a dense product (`triton_configs`). Single weights (blocks of
1 x 1) cannot be skipped there: their values are scattered to a dense weight for a dense product,
and the gradient is gathered from a dense one. So their time is a dense layer's, and only memory is
saved.

`TRITON_INTERPRET=1`, set before triton is imported, runs the kernels on CPUs, slowly, for tests.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_gpt.ops.compact import Operand
from sparse_gpt.ops.triton_configs import Choose, choose

SIDES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse_linears(
    x: Tensor, operands: Sequence[Operand], activation: str | None = None, choose: Choose = choose
) -> tuple[Tensor, ...]:
    """See `ops.compact.sparse_linears`, the specification."""
    from sparse_gpt.ops import autograd_triton

    return autograd_triton.sparse_linears(x, operands, activation, choose)


def why_not(device: torch.device, block: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why these kernels cannot compute such layers; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if block != (1, 1) and not all(side in SIDES for side in block):
        return (
            f"blocks of {block[0]} x {block[1]}: tensor cores need sides of 16, 32, 64 or 128 "
            "(or 1 x 1); sparsity.kernel: reference takes any, and so does storage: masked"
        )
    if dtype not in DTYPES:
        return f"{dtype}: it computes in bf16, fp16 and fp32"
    if device.type != "cuda":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"it needs an NVIDIA GPU, and the device is {device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU, and this is AMD's build of torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is less than 8.0"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler ($CC, gcc or clang) to launch kernels"
    return None
