"""What a run trains: the widths, and how many units each sparse layer keeps.

Asked by the plan, the model and the topology, so that all have the same integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from sparse_gpt.config import RunConfig
from sparse_gpt.errors import UserError
from sparse_gpt.ift import forms
from sparse_gpt.ift.distribution import distribute
from sparse_gpt.ift.iso_flop import solve_units
from sparse_gpt.ift.search import nearest, upper_bound
from sparse_gpt.ift.wide import width_step, with_width
from sparse_gpt.model.flops import kept_units, layer_shapes, linear_weights, sequence_flops
from sparse_gpt.model.run_flops import run_flops
from sparse_gpt.run_phases import phases
from sparse_gpt.run_scoring import scoring_phases

Dims = dict[str, int]


@dataclass(frozen=True)
class Solution:
    """The model as trained: its dimensions, and (kept, all) units of its sparse layers."""

    dims: Dims
    units: dict[str, tuple[int, int]]

    @property
    def sparsity(self) -> Fraction:
        """Of all layers that can be sparse, exactly; 0 for a dense model."""
        if not self.units:
            return Fraction(0)
        kept, every = (sum(counts) for counts in zip(*self.units.values(), strict=True))
        return 1 - Fraction(kept, every)


def solve(config: RunConfig, vocab_size: int) -> Solution:
    """Widths and unit counts of a run.

    `ift.iso_flop: layer`: the nominal sparsity to the nearest unit. Where blocks made Sparse Wide
    round its widths further than the heads do, counts are solved again so that every layer has its
    base layer's FLOPs to the nearest block (FACTS section 8); so they are for members that change
    a layer's form, whose sizes are whole numbers. `model`: App. A.2's search over whole
    units, for the sparsity or first for the width, so that the run costs what the dense model's
    does. `sparsity.distribution` shares the number out without changing it. Last, every layer's
    number is rounded to what the groups of its structure can share out. Raises `UserError` for
    filters that name no layer, and for what no sparsity or width solves.
    """
    if config.sparsity.sparsity == 0.0:
        return Solution(config.dims, {})
    if config.ift.iso_flop == "model":
        return _solve_model(config, vocab_size)
    layers = _Layers(config, config.dims)
    counts = layers.nominal()
    if config.sparsity.distribution == "erdos_renyi" or layers.fixed:
        counts = layers.share(sum(counts.values()))
    return layers.solution(counts)


def _solve_model(config: RunConfig, vocab_size: int) -> Solution:
    """App. A.2: counts at which the run costs what the dense model's does."""
    budget = base_cost(config, vocab_size)
    dims = config.dims
    if config.ift.solve == "width":
        dims = _solve_width(config, vocab_size, budget)
    layers = _Layers(config, dims)
    if config.sparsity.structure.n_m is not None:  # the width was all there is to choose
        return layers.solution(layers.nominal())
    taken = sum(layers.fixed.values())
    low = taken + len(layers.free)
    high = taken + sum(layers.free.values())

    def cost(total: int) -> int:
        return run_cost(config, vocab_size, layers.solution(layers.share(total)))

    if cost(low) > budget:
        ratio = Fraction(cost(low), budget)
        raise UserError(_unsolvable(config, layers, layers.solution(layers.share(low)), ratio))
    if cost(high) < budget:
        raise UserError(
            f"ift.iso_flop: model: {_described(config, dims)} with all its weights costs "
            f"{cost(high) / budget:.4f}x the dense model's run, so it is narrower than the dense "
            "model; raise sparsity.sparsity"
        )
    found = layers.solution(layers.share(nearest(cost, budget, low, high)))
    if config.sparsity.structure.balanced == "none":
        return found

    # Layers of one shape step together there, by a unit in each of their rows; alone they come
    # nearer.
    def excess(solution: Solution) -> int:
        return abs(run_cost(config, vocab_size, solution) - budget)

    for name in layers.free:
        near = [found, *layers.a_row_unit_from(found, name)]
        found = min(near, key=excess)
    return found


def _solve_width(config: RunConfig, vocab_size: int, budget: int) -> Dims:
    """The widths at which the nominal sparsity comes nearest to the dense model's run."""
    base, heads, multiple_of = config.base_dims, config.ift.heads, config.width_multiple

    def at(multiple: int) -> Dims:
        return config.projected(with_width(base, multiple, heads, multiple_of))

    def cost(multiple: int) -> int:
        layers = _Layers(config, at(multiple))
        total = sum(layers.nominal().values())
        return run_cost(config, vocab_size, layers.solution(layers.share(total)))

    first = -(-base["d_model"] // width_step(base, heads, multiple_of))
    if cost(first) > budget:
        raise UserError(
            f"ift.solve: width: at {100 * config.sparsity.sparsity:g} % and d_model "
            f"{at(first)['d_model']}, the smallest there is, a run of {config.sparsity.algorithm} "
            f"costs {cost(first) / budget:.3f}x the dense model's run; raise sparsity.sparsity"
        )
    return at(nearest(cost, budget, first, upper_bound(cost, budget, first)))


def run_cost(config: RunConfig, vocab_size: int, solution: Solution, world_size: int = 1) -> int:
    """FLOPs of a run as trained, for one sequence a step.

    Only in layer mode can the number of its steps depend on `world_size`.
    """
    steps = phases(config, solution.units.values(), world_size)
    return run_flops(_rest(config, vocab_size, solution), config.seq_len, 1, steps)


def scoring_cost(config: RunConfig, vocab_size: int, solution: Solution) -> int:
    """FLOPs of scoring a first topology before step 1, for one sequence of each global batch."""
    steps = scoring_phases(config, solution.units.values())
    return run_flops(_rest(config, vocab_size, solution), config.seq_len, 1, steps)


def _rest(config: RunConfig, vocab_size: int, solution: Solution) -> int:
    """Forward and backward FLOPs of a sequence outside the layers that can be sparse."""
    nothing, transform = dict.fromkeys(solution.units, 0), config.transform
    return sequence_flops(solution.dims, config.seq_len, vocab_size, nothing, transform).total


def base_cost(config: RunConfig, vocab_size: int, world_size: int = 1) -> int:
    """FLOPs of as many steps of the dense base model, for one sequence a step."""
    base = sequence_flops(config.base_dims, config.seq_len, vocab_size)
    return config.total_steps(world_size) * base.total


class _Layers:
    """The layers that can be sparse in a run of given dimensions, and what they could keep."""

    def __init__(self, config: RunConfig, dims: Dims) -> None:
        self.config, self.dims = config, dims
        weights = linear_weights(dims, config.transform)
        shapes = {name: weight.shape for name, weight in weights.items() if weight.sparse}
        for glob in config.sparsity.param_filter:
            if not any(_matches(name, glob) for name in shapes):
                raise UserError(
                    f"sparsity.param_filter: {glob} matches no layer; layers are "
                    "h.<i>.attn.{q,k,v,o}.weight and h.<i>.mlp.{fc1,fc2}.weight"
                )
        self.shapes = {name: shape for name, shape in shapes.items() if config.names_layer(name)}
        self.all_sparse = len(self.shapes) == len(weights)
        size = config.block_size
        self.totals = {name: out * inner // size for name, (out, inner) in self.shapes.items()}
        self.fixed = self._fixed()
        self.free = {n: total for n, total in self.totals.items() if n not in self.fixed}

    def _fixed(self) -> dict[str, int]:
        """Units of the layers that stay dense or have a sparsity of their own."""
        sparsity = self.config.sparsity
        fixed = {n: total for n, total in self.totals.items() if self.config.in_dense_block(n)}
        for glob, own in sparsity.layer_sparsity.items():
            named = [name for name in self.totals if _matches(name, glob)]
            if not named:
                raise UserError(f"sparsity.layer_sparsity: {glob} matches no sparse layer")
            twice = [name for name in named if name in fixed]
            if twice:
                raise UserError(
                    f"sparsity.layer_sparsity: {glob} names {twice[0]}, which another glob, "
                    "dense_first or dense_last names too; name a layer once"
                )
            fixed.update({name: kept_units(self.totals[name], own) for name in named})
        return fixed

    def nominal(self) -> dict[str, int]:
        """Units of every layer by itself: nominal, or solved again for the base layer's FLOPs."""
        config, sparsity = self.config, self.config.sparsity
        solved: dict[str, int] | None = None
        if config.ift.iso_flop == "layer" and config.ift.sparsity in (None, sparsity.sparsity):
            if config.ift.member == "wide" and config.width_multiple is not None:
                solved = solve_units(config.base_dims, self.dims, sparsity.structure.block)
            elif config.transform is not None:
                layers = layer_shapes(self.dims)
                solved = solve_forms(config.transform, layers, config.block_size)
        if solved is not None:
            return {name: solved[name] for name in self.totals}
        return {name: kept_units(total, sparsity.sparsity) for name, total in self.totals.items()}

    def share(self, total: int) -> dict[str, int]:
        """`total` units over the layers; a global selection, not yet known, as if uniform."""
        sparsity = self.config.sparsity
        block, rule = sparsity.structure.block, sparsity.distribution
        rule = "uniform" if rule == "global" else rule
        return distribute(self.shapes, total, block, rule, self.fixed)

    def solution(self, counts: Mapping[str, int]) -> Solution:
        units = {name: (self._in_groups(name, counts[name]), n) for name, n in self.totals.items()}
        return Solution(self.dims, units)

    def a_row_unit_from(self, solution: Solution, name: str) -> list[Solution]:
        """With a unit less, and one more, in every row of one layer, where there can be."""
        kept, every = solution.units[name]
        rows = self.shapes[name][0] // self.config.sparsity.structure.block[0]
        counts = [count for count in (kept - rows, kept + rows) if rows <= count <= every]
        return [Solution(self.dims, {**solution.units, name: (count, every)}) for count in counts]

    def _in_groups(self, name: str, kept: int) -> int:
        """The number of units next to `kept` that the groups of the structure can share out.

        N:M leaves no choice. Balanced rows each keep the same number, at least one.
        """
        structure = self.config.sparsity.structure
        if structure.n_m is not None:
            n, m = structure.n_m
            return self.totals[name] // m * n
        if structure.balanced == "none":
            return kept
        rows = self.shapes[name][0] // structure.block[0]
        return rows * max(1, (2 * kept + rows) // (2 * rows))


def _matches(weight: str, glob: str) -> bool:
    """Whether a glob names a weight, or the plain weight of the layer it belongs to."""
    return any(fnmatchcase(name, glob) for name in (weight, f"{forms.layer_of(weight)}.weight"))


def solve_forms(
    transform: forms.Transform, layers: Mapping[str, tuple[int, int]], block_size: int
) -> dict[str, int]:
    """Active blocks of each sparse weight of the transformed layers: the dense layer's MACs."""
    return {
        f"{layer}.{name}": count
        for layer, (out, inner) in layers.items()
        for name, count in forms.solve_units(
            forms.weights_of(transform, layer, (out, inner)), out * inner, block_size
        ).items()
    }


def _described(config: RunConfig, dims: Dims) -> str:
    head = "projected" if "d_embed" in dims else "tied"
    nominal = f"{100 * config.sparsity.sparsity:g} %"
    return f"{config.ift.member} {nominal} (d_model {dims['d_model']}, {head} head)"


def _unsolvable(config: RunConfig, layers: _Layers, sparsest: Solution, ratio: Fraction) -> str:
    parts = ["attention scores", "softmax", "LM head"]
    parts += ["projections"] if "d_embed" in layers.dims else []
    parts += ["dense layers"] if layers.fixed or not layers.all_sparse else []
    kept = config.block_size * sum(kept for kept, _ in sparsest.units.values())
    steps = phases(config, sparsest.units.values(), world_size=1)
    more = any(max(phase.active, phase.gradient) > kept for phase in steps)
    parts += [f"what {config.sparsity.algorithm} computes besides"] if more else []
    widens = config.ift.member == "wide"
    remedies = ["ift.head: project"] if widens and config.ift.head == "dense" else []
    remedies += ["ift.solve: width"] if widens else []
    remedies += ["a lower sparsity.sparsity"]
    return (
        f"ift.iso_flop: model: no sparsity makes {_described(config, layers.dims)} cost what the "
        f"dense model costs: what does not depend on it ({', '.join(parts)}) is alone "
        f"{float(ratio):.3f}x the dense model; set {' or '.join(remedies)}"
    )
