"""Random scores that are a function of (seed, update, layer, index) and of nothing else.

A counter-based hash, in wrapping 64-bit integer arithmetic: the same on every device, for every
world size and for any part of a layer, so random growth needs no generator state and no exchange.
"""

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_M1, _M2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_STEP = _signed(0x9E3779B97F4A7C15)


def _shift(x: Tensor, bits: int) -> Tensor:
    # A logical right shift; torch's is arithmetic on signed integers.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_scores(
    seed: int, update: int, layer: str, start: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """int64 scores in [0, 2^62) of positions `start .. start + count - 1` of a layer, `[count]`.

    `update` numbers the topology updates; 0 is the initial mask.
    """
    digest = hashlib.sha256(f"{seed}/{update}/{layer}".encode()).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = x * _STEP + key
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return _shift(x ^ _shift(x, 31), 2)
