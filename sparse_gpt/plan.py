"""What a run will take, before it starts: pure arithmetic on dimensions, at any size."""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sparse_gpt.config import RunConfig
from sparse_gpt.ift.forms import Transform
from sparse_gpt.ift.iso_flop import Residual, residual
from sparse_gpt.memory import (
    StageMemory,
    activation_bytes,
    by_stage,
    growth_bytes,
    state_bytes,
    view_bytes,
)
from sparse_gpt.model.flops import FlopsLedger, linear_shapes, linear_weights, sequence_flops
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.run_method import method_of
from sparse_gpt.run_phases import topology_updates
from sparse_gpt.sparse_units import base_cost, run_cost, solve
from sparse_gpt.topology.cost import UpdateCost, update_cost

SUB_GROUP = 10**9  # elements of a rank that DeepSpeed steps at once at stage 3


@dataclass(frozen=True)
class Plan:
    """Exact integers; FLOPs are forward and backward as Table 17 counts them, memory in bytes.

    `flops_total` is what the ledger of the run will show at its end: the products of the weights
    active in each step, and dense weight gradients where the method asks for them. Other figures
    are those of the model at its final sparsity. `base_*` is the dense base model on the same
    tokens, `masked_*` what the masked kernel computes: every product in full.
    """

    name: str
    model: GPTConfig
    base_dims: dict[str, int]
    ift_member: str
    iso_flop: str
    solve: str
    algorithm: str
    sparsity: float  # nominal
    achieved_sparsity: float  # of the sparse layers: solved for, in whole weights or blocks
    layer_residual: Residual  # the sparsified layers against the base model's

    parameters: int
    active_parameters: int
    base_parameters: int
    storage: str
    stored_parameters: int
    layer_bytes: int  # of the linear layers' states: weights, gradients, Adam's, views of blocks
    base_layer_bytes: int  # of the base model's

    flops_per_token: int
    base_flops_per_token: int
    masked_flops_per_token: int
    flops_per_sequence: int
    base_flops_per_sequence: int
    flops_total: int
    base_flops_total: int
    masked_flops_total: int
    topology_updates: int
    extra_flops: int  # in flops_total, of steps that compute more than the active weights

    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    accumulation: int
    steps: int
    warmup_steps: int
    tokens: int

    ranks: int
    precision: str
    zero_stage: int
    offload_optimizer: str
    memory: dict[int, StageMemory]  # a rank's, by ZeRO stage
    activations: int  # a rank's, without activation checkpointing
    activations_checkpointed: int
    checkpoint_bytes: int
    sparse_layers: int  # weights with a mask of their own
    growth_bytes: int  # of a rank with compact storage, in steps that grow by gradient
    update: UpdateCost | None  # of a topology update of a rank with masked storage, if any
    update_freq: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the memory of a stage with its total, the residual as its excess."""
        tree = dataclasses.asdict(self)
        tree["layer_residual"]["excess"] = float(self.layer_residual.excess)
        for stage, memory in self.memory.items():
            tree["memory"][stage]["total"] = memory.total
        return tree


def parameter_count(
    dims: dict[str, int], vocab_size: int, n_positions: int, transform: Transform | None = None
) -> int:
    """Parameters of a GPT: embeddings (the head is tied), weights, biases and LayerNorms."""
    d, f, e = dims["d_model"], dims["d_ff"], dims.get("d_embed")
    weights = sum(weight.numel for weight in linear_weights(dims, transform).values())
    biases = 4 * d + f + d
    ends = vocab_size * (e or d) + n_positions * d + (2 * d * e if e else 0)
    return ends + weights + dims["n_layer"] * (biases + 4 * d) + 2 * d


def plan(config: RunConfig, vocab_size: int, world_size: int, precision: str | None = None) -> Plan:
    """The plan of a run on `world_size` ranks. No tensor is made: 175B takes no longer.

    `precision` is what `auto` turned out to be; without it, `auto` counts as bf16 where ZeRO
    allows that. Raises `UserError` where the batch does not fit the ranks.
    """
    solution = solve(config, vocab_size)
    dims, base = solution.dims, config.base_dims
    gpt = config.gpt_config(vocab_size, dims)
    if precision is None:
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if config.deepspeed.zero_stage else "fp32"
    units, block, storage = solution.units, config.block_size, config.sparsity.storage
    active = {name: kept * block for name, (kept, _) in units.items()}
    dropped = sum(every - kept for kept, every in units.values()) * block
    # A layer that keeps everything has no mask.
    masked = {name: every for name, (kept, every) in units.items() if kept < every}
    ledger = FlopsLedger.of(dims, config.seq_len, vocab_size, active, gpt.transform)
    base_flops = sequence_flops(base, config.seq_len, vocab_size).total

    steps, batch = config.total_steps(world_size), config.batch(world_size)
    sequences = steps * batch
    updates = topology_updates(config, world_size) if masked else 0
    total = batch * run_cost(config, vocab_size, solution, world_size)

    parameters = parameter_count(dims, vocab_size, gpt.n_positions, gpt.transform)
    stored, views = parameters, 0
    if storage == "compact":
        stored = parameters - dropped
        shapes, (b_out, b_in) = linear_shapes(dims, gpt.transform), config.sparsity.structure.block
        views = sum(
            view_bytes(units[name][0], (shapes[name][0] // b_out, shapes[name][1] // b_in))
            for name in masked
        )
    layers = residual(base, dims, active, gpt.transform)["all"]
    held = layers.active + stored - (parameters - dropped)
    each = sum(state_bytes(precision, config.deepspeed.zero_stage))
    micro = config.micro_batch_size
    memory_args = (gpt, micro, config.seq_len, precision)
    return Plan(
        name=config.name,
        model=gpt,
        base_dims=base,
        ift_member=config.ift.member,
        iso_flop=config.ift.iso_flop,
        algorithm=config.sparsity.algorithm,
        sparsity=config.sparsity.sparsity,
        solve=config.ift.solve,
        achieved_sparsity=float(solution.sparsity),
        layer_residual=layers,
        parameters=parameters,
        active_parameters=parameters - dropped,
        base_parameters=parameter_count(base, vocab_size, gpt.n_positions),
        storage=storage,
        stored_parameters=stored,
        layer_bytes=each * held + views,
        base_layer_bytes=each * layers.base,
        flops_per_token=ledger.active.total // config.seq_len,
        base_flops_per_token=base_flops // config.seq_len,
        masked_flops_per_token=ledger.dense.total // config.seq_len,
        flops_per_sequence=ledger.active.total,
        base_flops_per_sequence=base_flops,
        flops_total=total,
        base_flops_total=batch * base_cost(config, vocab_size, world_size),
        masked_flops_total=sequences * ledger.dense.total,
        topology_updates=updates,
        extra_flops=total - sequences * ledger.active.total,
        seq_len=config.seq_len,
        micro_batch_size=micro,
        global_batch_size=batch,
        accumulation=config.accumulation(world_size),
        steps=steps,
        warmup_steps=config.warmup_steps(world_size),
        tokens=sequences * config.seq_len,
        ranks=world_size,
        precision=precision,
        zero_stage=config.deepspeed.zero_stage,
        offload_optimizer=config.deepspeed.offload_optimizer,
        memory=by_stage(
            *(gpt, stored, masked, block, micro, config.seq_len, precision, world_size),
            views=views if storage == "compact" else None,
        ),
        activations=activation_bytes(*memory_args, checkpointing=False),
        activations_checkpointed=activation_bytes(*memory_args, checkpointing=True),
        # fp32 master and two moments, a bit a block, and what lies in each slot.
        checkpoint_bytes=12 * stored
        + sum(-(-count // 8) for count in masked.values())
        + (4 * sum(units[name][0] for name in masked) if storage == "compact" else 0),
        sparse_layers=len(masked),
        growth_bytes=_growth_bytes(config, masked, block, precision, world_size) if updates else 0,
        update=_update_cost(config, masked, block, parameters, world_size) if updates else None,
        update_freq=config.sparsity.update.freq,
    )


def _growth_bytes(
    config: RunConfig, units: dict[str, int], block: int, precision: str, world_size: int
) -> int:
    if config.sparsity.storage == "masked" or method_of(config, world_size).growth != "gradient":
        return 0
    weights, micro = [count * block for count in units.values()], config.accumulation(world_size)
    return growth_bytes(weights, block, config.sparsity.growth_score, precision, world_size, micro)


def _update_cost(
    config: RunConfig, units: dict[str, int], block: int, parameters: int, world_size: int
) -> UpdateCost | None:
    if config.sparsity.storage == "compact":
        return None
    weights = [count * block for count in units.values()]
    whole_model, stage = config.sparsity.update.scope == "model", config.deepspeed.zero_stage
    ranks = world_size if stage else 1
    batches = 1
    if stage == 3 and not whole_model:
        batches = -(-sum(weights) // ranks // SUB_GROUP)
    return update_cost(
        method_of(config, world_size),
        weights,
        block,
        parameters,
        ranks,
        whole_model=whole_model,
        batches=batches,
        grouped=config.sparsity.structure.grouped,
    )


def render(plan: Plan) -> str:
    """The plan as text, a line a topic."""
    m = plan.model
    shape = f"{m.n_layer} layers, d_model {m.d_model}, d_ff {m.d_ff}, {m.n_head} heads"
    if m.d_embed is not None:
        shape += f", embedding {m.d_embed} (projected)"
    lines = [
        f"plan: {plan.name}",
        f"  model        {shape}, vocabulary {m.vocab_size}, {m.n_positions} positions",
        f"  parameters   {plan.parameters:,} in all, {plan.active_parameters:,} active; "
        f"dense base model {plan.base_parameters:,}",
    ]
    if plan.sparsity:
        lines.append(
            f"  sparsity     {plan.sparsity:g} nominal, {plan.achieved_sparsity:.6f} solved; "
            f"{plan.algorithm}, {plan.topology_updates:,} updates"
        )
        over = plan.layer_bytes / plan.base_layer_bytes
        lines.append(
            f"  storage      {plan.storage}: {plan.stored_parameters:,} parameters; linear layers "
            f"take {bytes_text(plan.layer_bytes)} (weights, gradients, Adam), {over:.3f}x the "
            "dense base model's"
        )
    if plan.ift_member != "none":
        lines.append(f"  iso-FLOP     {_iso_flop(plan)}")
    if m.transform is not None:
        lines.append(f"  layers       {_forms(m.transform)}")
    lines += [
        f"  FLOPs/token  {_flops(plan.flops_per_token)}, "
        f"{_ratio(plan.flops_per_token, plan.base_flops_per_token)} of the dense base model "
        f"({_flops(plan.base_flops_per_token)}); "
        f"{_flops(plan.masked_flops_per_token)} computed with masked storage",
        f"  FLOPs        {_flops(plan.flops_total)} in all, "
        f"{_ratio(plan.flops_total, plan.base_flops_total)} of the dense base model "
        f"({_flops(plan.base_flops_total)})",
        f"  steps        {plan.steps:,} of {plan.global_batch_size:,} sequences of "
        f"{plan.seq_len:,}: {plan.tokens:,} tokens; warmup {plan.warmup_steps:,}; "
        f"{plan.ranks} ranks x {plan.micro_batch_size} x {plan.accumulation} accumulated",
        f"  memory/rank  {plan.precision}, estimated, by ZeRO stage (* this run):",
    ]
    for stage, memory in plan.memory.items():
        chosen = "*" if stage == plan.zero_stage else " "
        lines.append(
            f"   {chosen} stage {stage}   {bytes_text(memory.total)} = weights "
            f"{bytes_text(memory.weights)} + gradients {bytes_text(memory.gradients)} + optimizer "
            f"{bytes_text(memory.optimizer)} + masks {bytes_text(memory.masks)} + "
            + (f"views {bytes_text(memory.views)} + " if memory.views else "")
            + f"activations {bytes_text(memory.activations)}"
        )
    if plan.offload_optimizer != "none":
        lines.append("    the optimizer's share lies in host memory (offload_optimizer)")
    lines += [
        f"    activations {bytes_text(plan.activations)}, with activation checkpointing "
        f"{bytes_text(plan.activations_checkpointed)}",
        f"  checkpoint   {bytes_text(plan.checkpoint_bytes)}",
    ]
    if plan.growth_bytes:
        lines.append(
            f"  growth       {bytes_text(plan.growth_bytes)} more memory a rank in update steps, "
            f"every {plan.update_freq} steps"
        )
    if plan.update is not None:
        u = plan.update
        lines.append(
            f"  update       {u.exchanges} exchanges, {bytes_text(u.sent)} sent a rank and "
            f"{bytes_text(u.extra)} more memory, every {plan.update_freq} steps (times: --updates)"
        )
    return "\n".join(lines)


def _forms(transform: Transform) -> str:
    """The sizes of the transformed layers, by kind: `attn.q 4, ..., mlp.fc2 4`."""
    what = "branches" if transform.member == "parallel" else "inner width"
    sizes: dict[str, set[int]] = {}
    for layer, size in transform.sizes.items():
        sizes.setdefault(".".join(layer.split(".")[2:]), set()).add(size)
    each = ", ".join(f"{kind} {'/'.join(map(str, sorted(s)))}" for kind, s in sizes.items())
    return f"{transform.member}, sigma = {transform.non_linearity}; {what}: {each or 'no layer'}"


def _iso_flop(plan: Plan) -> str:
    """What the run is iso-FLOP in, and how near it comes."""
    if plan.iso_flop == "layer":
        return (
            f"{plan.ift_member}, per layer (not per model): sparsified layers "
            f"{100 * float(plan.layer_residual.excess):+.3f} % of the base model's FLOPs from "
            f"rounding, the whole model {plan.flops_per_token / plan.base_flops_per_token:.3f}x"
        )
    excess = float(Fraction(plan.flops_total, plan.base_flops_total) - 1)
    near = "" if abs(excess) <= 1e-6 else ", the nearest that whole units come"
    return (
        f"{plan.ift_member}, whole run, solved for the {plan.solve}: {excess:+.1e} of the dense "
        f"model's run{near}"
    )


def _flops(count: int) -> str:
    return f"{count:.4g}" if count < 1e6 else f"{count:.3e}"


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.4f}x"


def bytes_text(count: int) -> str:
    """In kB, MB, GB or TB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"
