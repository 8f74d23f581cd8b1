"""Which kernel computes a sparse linear layer.

An explicit choice that cannot run is an error that says why; `auto` logs once what it took.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.ops import masked, reference

logger = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]

KERNELS: dict[str, Kernel] = {
    "masked": masked.sparse_linear,
    "reference": reference.sparse_linear,
}


def resolve_kernel(name: str, device: torch.device, storage: str = "masked") -> Kernel:
    """The function behind a `sparsity.kernel` name, or a `UserError` naming what there is."""
    if name == "auto":
        logger.info("kernel: auto took 'masked' (%s storage on %s)", storage, device.type)
        return KERNELS["masked"]
    if name not in KERNELS:
        raise UserError(
            f"sparsity.kernel: no kernel {name!r}; there are: auto, {', '.join(KERNELS)}"
        )
    return KERNELS[name]
