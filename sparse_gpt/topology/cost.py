"""What a topology update will cost: counted exchanges and bytes, and a time from bandwidths.

Counts follow `select` and `controller`; tests hold them against a running update. Scores without
ties are assumed: ties add rounds to the layers that have them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_gpt.topology.bits import chunk_size
from sparse_gpt.topology.methods import Method
from sparse_gpt.topology.select import BINS, SAMPLE

ROUNDS = 2  # exchanges of histograms in a selection of distinct scores
# Bytes of memory that a weight's part in an update moves where each operation reads and writes
# its operands (GPU): keys, comparisons and packing of the drop, of growth by gradient or by
# random scores; and zeroing the master and both moments.
_DROP, _GROW_GRADIENT, _GROW_RANDOM, _ZERO = 40, 32, 96, 51
# AdamW reads and writes the master and both moments, and reads the gradient.
_ADAM = 28


@dataclass(frozen=True)
class UpdateCost:
    """One topology update of one rank. Bytes are exact counts but for `extra` (an upper estimate).

    `payload`: handed to all-reduces; `sent`: what a ring moves of it out of a rank; `extra`: peak
    memory beyond weights, moments and masks; `touched`: memory traffic; `adam`: of the optimizer
    step over the same shard.
    """

    exchanges: int
    payload: int
    sent: int
    extra: int
    touched: int
    adam: int

    def seconds(self, memory: float, network: float, latency: float) -> float:
        """Time of the update: bytes/s of a rank's memory and network, seconds an exchange takes."""
        return self.touched / memory + self.sent / network + self.exchanges * latency


def update_cost(
    method: Method,
    weights: Sequence[int],
    block_size: int,
    parameters: int,
    ranks: int,
    on_gpu: bool = True,
) -> UpdateCost:
    """Cost with `weights` in each sparse layer, sharded over `ranks`; layer-wise selection.

    `parameters`: of the whole model, which the optimizer's shard is a part of.
    """
    layers, shard = len(weights), -(-sum(weights) // ranks)
    by_gradient = method.growth == "gradient"
    counts = 2 * 8 * layers  # grown and active units, to check them
    if block_size == 1:
        sampled = 1 + by_gradient
        samples = sum(4 * min(SAMPLE, size) for size in weights)
        histograms = 2 * ROUNDS * layers * 4 * (2 + BINS)
        payload = sampled * samples + histograms + counts
        exchanges = sampled + 2 * ROUNDS + 2
        # Sets of units as bits (old, above, dropped, kept, inverse, grown), and what is kept
        # inside the brackets.
        extra = math.ceil(shard * (6 / 8 + 8 * 0.03)) + samples + histograms
    else:
        units = sum(size // block_size for size in weights)
        vectors = 1 + by_gradient
        payload = vectors * (8 * units + 4 * layers) + 2 * 8 + 8 * layers
        exchanges = 2 * vectors + 1
        extra = (2 * vectors + 1) * 8 * units
    extra += 32 * min(shard, chunk_size(torch.device("cuda" if on_gpu else "cpu")))
    grow = _GROW_GRADIENT if by_gradient else _GROW_RANDOM
    return UpdateCost(
        exchanges=exchanges,
        payload=payload,
        sent=2 * payload * (ranks - 1) // ranks,
        extra=extra,
        touched=shard * (_DROP + grow + _ZERO),
        adam=_ADAM * -(-parameters // ranks),
    )
