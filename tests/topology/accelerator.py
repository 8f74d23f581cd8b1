"""Tensors that say they are on a CUDA device and are not: code for accelerators, without one.

    with pretending():
        there = torch.arange(3).to("cuda")
        there + torch.arange(3)  # raises, as it would
        there.numpy()  # raises

It takes the branches a GPU would take and refuses what mixes devices; what differs in kernels
themselves it cannot tell.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sparse_gpt.topology import bits

THERE = torch.device("cuda")
# They copy between devices.
_COPIES = {Tensor.copy_, Tensor.__setitem__}


class _There(Tensor):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return THERE


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or leaf in ("cuda", "cpu")


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, _There):
        return leaf.as_subclass(Tensor)
    return torch.device("cpu") if not isinstance(leaf, Tensor) and _is_device(leaf) else leaf


class _Pretending(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = [isinstance(tensor, _There) for tensor in tensors]
        asked = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and _is_device(leaf)]
        if func is Tensor.numpy and any(there):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        moves = func in (Tensor.to, Tensor.cpu) or func in _COPIES
        mixed = any(there) and any(not t and x.dim() for t, x in zip(there, tensors))
        if mixed and not moves:
            raise RuntimeError(f"{func.__name__}: tensors on cuda:0 and on cpu")
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        goes = torch.device(asked[0]) == THERE if asked else any(there) and func is not Tensor.cpu

        def place(leaf: Any) -> Any:
            return leaf.as_subclass(_There) if goes and isinstance(leaf, Tensor) else leaf

        return tree_map(place, result)


@contextmanager
def pretending() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, _Pretending():
        patch.setattr(bits, "_TABLES", dict(bits._TABLES))  # it remembers devices
        yield
