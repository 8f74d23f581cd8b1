"""Which kernel computes a sparse linear layer.

An explicit choice that cannot run is an error that says why; `auto` logs once what it took.
"""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.ops import block_cpu, block_triton, compact, masked, reference, semi_structured
from sparse_gpt.ops.compact import CompactKernel

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]

# Over masked storage: a dense weight and a pattern.
KERNELS: dict[str, Kernel] = {
    "masked": masked.sparse_linear,
    "reference": reference.sparse_linear,
    "semi_structured": semi_structured.sparse_linear,
}
# Over compact storage, in the order in which `auto` tries them; what each needs is in `why_not`.
COMPACT: dict[str, CompactKernel] = {
    "block_cpu": block_cpu.sparse_linears,
    "block_triton": block_triton.sparse_linears,
    "reference": compact.sparse_linears,
}


def resolve_kernel(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Kernel:
    """The function behind a `sparsity.kernel` over masked storage, or a `UserError`.

    Without a `dtype`, a kernel that does not compute in the weights' says so when it is called.
    """
    if name == "auto":
        logger.info("kernel: auto took 'masked' (masked storage on %s)", device.type)
        return KERNELS["masked"]
    if name in COMPACT and name not in KERNELS:
        raise UserError(f"sparsity.kernel: {name} needs sparsity.storage: compact")
    if name not in KERNELS:
        raise UserError(
            f"sparsity.kernel: no kernel {name!r}; there are: auto, {', '.join(KERNELS)}"
        )
    if name == "semi_structured" and (reason := semi_structured.why_not(device, dtype)):
        raise UserError(f"sparsity.kernel: {name} cannot run here: {reason}")
    return KERNELS[name]


def why_not(
    name: str, device: torch.device, block: tuple[int, int], dtype: torch.dtype
) -> str | None:
    """Why a kernel over compact storage cannot compute such layers; None where it can."""
    if name == "block_cpu":
        return block_cpu.why_not(device, dtype)
    if name == "block_triton":
        return block_triton.why_not(device, block, dtype)
    return None


def refusals(
    device: torch.device, block: tuple[int, int], dtype: torch.dtype
) -> dict[str, str | None]:
    """`why_not` of every kernel over compact storage, on this rank."""
    return {name: why_not(name, device, block, dtype) for name in COMPACT}


def resolve_compact(
    name: str,
    device: torch.device,
    block: tuple[int, int],
    dtype: torch.dtype,
    refused_by: Mapping[str, str | None] | None = None,
) -> tuple[str, CompactKernel]:
    """The kernel behind a `sparsity.kernel` over compact storage, and its name.

    `refused_by`: `refusals` that hold on any rank, so that all take the same kernel; without it
    this rank's own.
    """
    if refused_by is None:
        refused_by = refusals(device, block, dtype)
    if name != "auto":
        if name not in COMPACT:
            raise UserError(
                f"sparsity.kernel: no kernel {name!r} over compact storage; there are: auto, "
                f"{', '.join(COMPACT)}"
            )
        reason = refused_by[name]
        if reason is not None:
            raise UserError(f"sparsity.kernel: {name} cannot run here: {reason}")
        return name, COMPACT[name]
    refused = []
    for candidate, kernel in COMPACT.items():
        reason = refused_by[candidate]
        if reason is None:
            logger.info(
                "kernel: auto took %r (compact storage, blocks of %d x %d, %s on %s%s)",
                *(candidate, *block, str(dtype).removeprefix("torch."), device.type),
                "".join(f"; {reason}" for reason in refused),
            )
            return candidate, kernel
        refused.append(f"{candidate}: {reason}")
    raise RuntimeError("the reference runs everywhere: a bug")
