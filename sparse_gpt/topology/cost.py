"""What a topology update will cost: exchanges, bytes and memory, and a time from bandwidths.

Counts follow `select` and `controller`, and tests hold them against running updates. How many
rounds of histograms a selection takes depends on its scores: one or two, and a third where scores
in the last bin are equal, which happens in large layers. Three are assumed for all layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_gpt.topology.bits import chunk_size
from sparse_gpt.topology.methods import Method
from sparse_gpt.topology.select import BINS, SAMPLE

ROUNDS = 3  # exchanges of histograms in a selection
# Operations started on the device for a layer (counted for RigL; SET has about as many): chunks
# of large layers, which take long enough to hide it, are not counted.
_LAUNCHES = 170
# Bytes of memory that a weight's part in an update moves where each operation reads and writes
# its operands (GPU): keys, comparisons and packing of a selection by magnitude, by gradient or by
# random scores; and zeroing the master and both moments.
_MAGNITUDE, _GRADIENT, _RANDOM, _ZERO = 40, 32, 96, 51
# Bytes a weight of the one layer whose groups are being solved: keys, sets, benefits in tiles.
_LAYER = 40
# AdamW reads and writes the master and both moments, and reads the gradient.
_ADAM = 28


@dataclass(frozen=True)
class UpdateCost:
    """One topology update of one rank; upper estimates, in bytes where nothing else is said.

    `payload`: handed to all-reduces; `sent`: what a ring moves of it out of a rank; `extra`: peak
    memory beyond weights, moments and masks; `launches`: operations started on the device;
    `touched`: memory traffic; `adam`: of the optimizer step over the same shard.
    """

    exchanges: int
    payload: int
    sent: int
    extra: int
    launches: int
    touched: int
    adam: int

    def seconds(self, memory: float, network: float, latency: float, launch: float) -> float:
        """Time of the update: bytes/s of a rank's memory and network, seconds that an exchange
        and the start of an operation take."""
        work = max(self.touched / memory, self.launches * launch)
        return work + self.sent / network + self.exchanges * latency


def update_cost(
    method: Method,
    weights: Sequence[int],
    block_size: int,
    parameters: int,
    ranks: int,
    on_gpu: bool = True,
    whole_model: bool = False,
    batches: int = 1,
    grouped: bool = False,
) -> UpdateCost:
    """Cost with `weights` in each sparse layer, sharded over `ranks` (1 where they are not).

    `parameters`: of the whole model, which the optimizer's shard is a part of. `whole_model`: the
    scope of the selection. `batches`: optimizer steps in an engine's step, each with its own
    exchanges (ZeRO 3 makes one a 10^9 weights of a rank). `grouped`: N:M or balanced rows, whose
    scores are put together a layer at a time; what solving groups takes is not in `launches` and
    `touched` (benchmarks/n_m.py measures it).
    """
    layers, shard = len(weights), -(-sum(weights) // ranks)
    by_gradient, many = method.growth == "gradient", len(method.selects)
    sampled = many - method.selects.count("random")
    apart = grouped and block_size == 1 and many > 0
    if apart:  # the choice in groups, of growth or of a whole pattern, is no selection over shards
        many, sampled = many - 1, sampled - ("random" not in method.selects)
    vectors = 1 + by_gradient
    counts = 2 * 8 * layers  # grown units, and active ones to check them
    if block_size == 1:
        groups = 1 if whole_model else layers
        size = max(256, 4 * SAMPLE // layers) if whole_model and layers > 1 else SAMPLE
        samples = sampled * sum(4 * min(size, weight) for weight in weights)
        histograms = many * ROUNDS * groups * 4 * (2 + BINS)
        payload = samples + histograms + counts + (many * 8 * layers if whole_model else 0)
        exchanges = sampled + many * ROUNDS + 1 + many * whole_model
        # Sets of units as bits (old, above, dropped, kept, inverse, grown), and what is kept
        # inside the brackets.
        extra = math.ceil(shard * (6 / 8 + 8 * 0.03)) + samples + histograms
    else:
        units = sum(size // block_size for size in weights)
        payload = vectors * (8 * units + 4 * layers) + 2 * 8
        exchanges = 2 * vectors
        extra = (2 * vectors + 1) * 8 * units
    if apart:
        # Keys of 4 bytes, where they are not random, and what was dropped, where anything was.
        keys, flags = "random" not in method.selects, "smallest magnitude" in method.selects
        payload += sum(weights) * (4 * keys + flags)
        exchanges += layers * (keys + flags)
        extra += _LAYER * max(weights)
    if method.stores_all:  # layers get their patterns, one after the other
        payload += sum(weights) // block_size
        exchanges += layers
    extra += 32 * min(shard, chunk_size(torch.device("cuda" if on_gpu else "cpu")))
    passes = {"random": _RANDOM, "largest gradient": _GRADIENT}
    touched = sum(passes.get(score, _MAGNITUDE) for score in method.selects)
    return UpdateCost(
        exchanges=batches * exchanges + 1,  # and a check at the end
        payload=payload,
        sent=2 * payload * (ranks - 1) // ranks,
        extra=extra,
        launches=_LAUNCHES * layers,
        touched=shard * (touched + _ZERO),
        adam=_ADAM * -(-parameters // ranks),
    )
