"""Peak memory of a piece of code beyond what was there before: tensors and numpy arrays."""

import time
import tracemalloc
import weakref
from typing import Any

import torch
import torch.utils._pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts storages made inside the `with` block while they are alive.

    `peak`: bytes of tensors at their highest moment plus those of numpy arrays at theirs, an upper
    bound; on a GPU what its allocator says. `largest`: bytes of the largest tensor. Slows the code
    down: do not time inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._tensors = self._alive = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id_of(t) for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            key = id_of(tensor)
            if key not in before and key not in self._known:
                self._add(key, tensor)
        return out

    def _add(self, key: int, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known[key] = size
        self._alive += size
        self.largest = max(self.largest, size)
        self._tensors = max(self._tensors, self._alive)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._alive -= self._known.pop(key, 0)

    def __enter__(self) -> "PeakMemory":
        with _Nothing():  # what the first dispatch imports is not counted
            torch.zeros(1)
        tracemalloc.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._cuda = torch.cuda.memory_allocated()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.peak = self._tensors + tracemalloc.get_traced_memory()[1]
        # A thread of gloo that waits for the interpreter within an allocation would find what
        # stop() has freed (CPython gh-128679): let it finish.
        time.sleep(0.05)
        tracemalloc.stop()
        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - self._cuda)


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def id_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
