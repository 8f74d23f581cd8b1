"""Counts what a rank sends: calls and bytes of the collectives of torch.distributed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """Calls by name, and bytes that this rank sends, as rings and trees move them.

    An all-reduce of b bytes over n ranks sends 2 b (n - 1) / n a rank, an all-gather its part to
    n - 1 others; a broadcast's source sends b, a gather's senders their part.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: float = 0.0
    payload: list[int] = field(default_factory=list)  # bytes handed to each call

    def add(self, name: str, size: int, sent: float) -> None:
        self.calls[name] += 1
        self.payload.append(size)
        self.bytes += sent


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count inside the block; other collectives on tensors raise `RuntimeError` there."""
    traffic, world = Traffic(), dist.get_world_size()
    kept: dict[str, Any] = {}

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic.add("all_reduce", _size(tensor), 2 * _size(tensor) * (world - 1) / world)
        return kept["all_reduce"](tensor, *args, **kwargs)

    def all_gather_into_tensor(out: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic.add("all_gather_into_tensor", _size(tensor), _size(tensor) * (world - 1))
        return kept["all_gather_into_tensor"](out, tensor, *args, **kwargs)

    def broadcast(tensor: torch.Tensor, src: int, *args: Any, **kwargs: Any) -> Any:
        sent = _size(tensor) if dist.get_rank() == src else 0
        traffic.add("broadcast", _size(tensor), sent)
        return kept["broadcast"](tensor, src, *args, **kwargs)

    def send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic.add("send", _size(tensor), _size(tensor))
        return kept["send"](tensor, *args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a collective that is not counted")

    replaced = {
        "all_reduce": all_reduce,
        "all_gather_into_tensor": all_gather_into_tensor,
        "broadcast": broadcast,
        "send": send,
        **dict.fromkeys(
            (
                *("all_gather", "gather", "scatter", "reduce", "reduce_scatter"),
                *("reduce_scatter_tensor", "all_to_all", "all_to_all_single"),
                *("isend", "batch_isend_irecv", "all_gather_object", "broadcast_object_list"),
            ),
            refuse,
        ),
    }
    for name, function in replaced.items():
        kept[name] = getattr(dist, name)
        setattr(dist, name, function)
    try:
        yield traffic
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)
