"""Memory of a rank by arithmetic: states at each ZeRO stage, activations of a micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_gpt.model.gpt import GPTConfig


@dataclass(frozen=True)
class StageMemory:
    """Bytes a rank holds at one ZeRO stage.

    `gradients` are the fp32 accumulation; `optimizer` Adam's moments and the fp32 master;
    `masks` a bit a weight, sharded with the optimizer, or a bit a block on every rank; `views`
    what says where compactly stored blocks lie, on every rank. Buffers of the communication are
    not counted.
    """

    weights: int
    gradients: int
    optimizer: int
    masks: int
    activations: int
    views: int = 0

    @property
    def total(self) -> int:
        held = (self.weights, self.gradients, self.optimizer, self.masks, self.views)
        return sum(held) + self.activations


def state_bytes(precision: str, stage: int) -> tuple[int, int, int]:
    """Bytes a parameter: weight, gradient, optimizer.

    bf16: 2, 4 and 12 (master, moments). fp32: 4, 4 and 12, of which stage 0 has no separate
    master: 4, 4 and 8.
    """
    return 2 if precision == "bf16" else 4, 4, 8 if stage == 0 else 12


def view_bytes(blocks: int, grid: tuple[int, int]) -> int:
    """Bytes of a `BlockLayout` and the orders that a kernel goes by, at most three (`block_cpu`):
    int32, a slot, and a column and a slot of each order, a block; and where each row begins."""
    return 4 * (7 * blocks + 2 * (grid[0] + 1) + grid[1] + 1)


def states(
    parameters: int,
    units: int,
    block_size: int,
    activations: int,
    precision: str,
    stage: int,
    ranks: int,
    views: int | None = None,
) -> StageMemory:
    """Bytes a rank at a ZeRO stage: 1 shards the optimizer, 2 the gradients too, 3 all.

    `parameters`: those stored, each with `state_bytes`. `units`: weights of the sparse layers, or
    their blocks of `block_size` weights. `views`: bytes of the layouts of compact storage, whose
    masks every rank has whole. Shards are rounded up.
    """
    if precision == "bf16" and stage == 0:
        raise ValueError("bf16 has no ZeRO stage 0")
    weight, gradient, optimizer = state_bytes(precision, stage)
    sharded = stage > 0 and block_size == 1 and views is None

    def share(size: int, sharded_from: int) -> int:
        each = -(-parameters // ranks) if stage >= sharded_from else parameters
        return size * each

    return StageMemory(
        weights=share(weight, 3),
        gradients=share(gradient, 2),
        optimizer=share(optimizer, 1),
        masks=-(-units // 8 // (ranks if sharded else 1)),
        activations=activations,
        views=views or 0,
    )


def growth_bytes(
    weights: Sequence[int], block_size: int, score: str, precision: str, ranks: int, micro: int
) -> int:
    """Bytes that a rank holds more in a step whose gradients grow compactly stored layers.

    `exact`: of a layer at a time its dense gradient and that to be summed over ranks, in fp32; of
    what is summed the rank's own range, for all layers where there are several micro-batches or
    where weights are single. `microbatch_norm`: a number a block. `weights`: of each layer.
    """
    if score == "microbatch_norm":
        return 4 * sum(weights) // block_size
    lent = (4 + (2 if precision == "bf16" else 4)) * max(weights)
    ranges = [4 * -(-size // ranks) for size in weights]
    return lent + (max(ranges) if micro == 1 and block_size > 1 else sum(ranges))


def activation_bytes(
    config: GPTConfig, batch: int, seq_len: int, precision: str, checkpointing: bool
) -> int:
    """Bytes autograd keeps for backward of `batch` sequences, and the loss's fp32 temporaries.

    A block keeps, a token: the inputs and outputs of both LayerNorms, q, k, v and the attention's
    output (d each), fc1's output and its activation (f each); attention scores are never stored
    (fused attention), only their row sums. Dropout adds a byte-wide mask for each residual branch.
    With checkpointing a block keeps its input, and one block at a time all of it. The head keeps
    its logits, and fp32 copies for the loss; with `loss_chunk` those of a chunk, for each token a
    gradient, and in bf16 the embedding's gradient summed in fp32 and a product to add. On a CPU
    attention with dropout is not fused and keeps S x S scores a head as well; they are not
    counted. Transformed layers keep `inside_elements` besides.
    """
    size = 2 if precision == "bf16" else 4
    d, f = config.d_model, config.d_ff
    block = size * (8 * d + 2 * f) + 4 * config.n_head + 4 * 4  # and the LayerNorms' statistics
    if config.dropout:
        block += 2 * d
    inside = [size * elements for elements in inside_elements(config)]
    layers = config.n_layer * block + sum(inside)
    if checkpointing:
        layers = config.n_layer * size * d + block + max(inside)
    ends, logits = size * 2 * (d + (config.d_embed or 0)), config.vocab_size * (size + 2 * 4)
    tokens, chunk = batch * seq_len, config.loss_chunk
    if chunk is None:
        return tokens * (layers + ends + logits)
    width = config.d_embed or d
    summed = (size + 4) * config.vocab_size * width if precision == "bf16" else 0
    return tokens * (layers + ends + size * width) + min(chunk, tokens) * logits + summed


def inside_elements(config: GPTConfig) -> list[int]:
    """Elements a token that each block's transformed layers keep besides inputs and outputs.

    The inner width, twice where the non-linearity keeps its input (gelu) and V its output; and
    what the non-linearity of each branch, or of Doped's sparse part, keeps.
    """
    blocks = [0] * config.n_layer
    transform = config.transform
    if transform is None:
        return blocks
    linear, gelu = (transform.non_linearity == kind for kind in ("identity", "gelu"))
    for layer, size in transform.sizes.items():
        out = config.layer_shapes[layer][0]
        kept = {
            "parallel": 0 if linear else size * out,
            "doped": size + (0 if linear else out),
        }.get(transform.member, 2 * size if gelu else size)
        blocks[int(layer.split(".")[1])] += kept
    return blocks


def by_stage(
    config: GPTConfig,
    parameters: int,
    units: Mapping[str, int],
    block_size: int,
    batch: int,
    seq_len: int,
    precision: str,
    ranks: int,
    views: int | None = None,
) -> dict[int, StageMemory]:
    """`states` at every ZeRO stage the precision has; `units` are blocks by sparse layer."""
    activations = activation_bytes(
        config, batch, seq_len, precision, config.activation_checkpointing
    )
    return {
        stage: states(
            *(parameters, sum(units.values()), block_size, activations, precision, stage, ranks),
            views=views,
        )
        for stage in range(1 if precision == "bf16" else 0, 4)
    }
