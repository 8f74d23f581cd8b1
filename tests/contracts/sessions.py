"""Sessions of one run that are recorded from inside the ranks, and how two of them compare."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.topology.random import random_scores
from sparse_gpt.train.optim import optimizer_steps
from tests.contracts.runs import assemble, masks, model_weights, run_config, trainer

KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Whole:
    """Everything a step starts from, put together from all ranks."""

    tensors: dict[tuple[str, str], Tensor]  # by (kind, parameter)
    masks: dict[str, Tensor]
    state: dict[str, Any]
    adam_steps: int
    digest: str


@dataclass
class Update:
    """What a topology update looked at, a block a number: magnitudes after Adam, and growth."""

    fraction: float
    magnitude: dict[str, Tensor] = field(default_factory=dict)
    growth: dict[str, Tensor] = field(default_factory=dict)
    random: bool = False


@dataclass
class Session:
    """What one rank saw in one session; tensors are whole, and the same on every rank."""

    before: dict[int, Whole] = field(default_factory=dict)  # of the steps asked for
    masks: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # after each step
    batches: dict[int, list[Any]] = field(default_factory=dict)  # this rank's micro-batches
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    updates: dict[int, Update] = field(default_factory=dict)
    generators: dict[int, bytes] = field(default_factory=dict)  # this rank's
    said: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)  # at the end


class Watched:
    """Stands for a method and records what its updates compare."""

    def __init__(self, made: Any, seen: Session) -> None:
        self.made, self.seen, self.method = made, seen, made.controller.method
        self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def update(self, units: Any, sets: Any, targets: Any, step: int) -> Any:
        fraction = self.method.schedule.drop_fraction(step)
        shards, random = self.made.shards, self.method.growth == "random"
        update = self.seen.updates.setdefault(self.step, Update(fraction, random=random))
        for name in units.names:
            fragment = shards.fragment(name)
            master = None if fragment is None else fragment.master
            update.magnitude[name] = self.norms(assemble(self.made, name, master))
            if random:
                (seed, index), size = units.key, update.magnitude[name].numel()
                update.growth[name] = random_scores(seed, index, name, 0, size).double()
            else:
                gradient = None if fragment is None else shards.stepped_gradient(fragment)
                update.growth[name] = self.norms(assemble(self.made, name, gradient))
        return self.method.update(units, sets, targets, step)

    def norms(self, weight: Tensor) -> Tensor:
        """fp64 `[blocks]`: L2 norms of a weight's blocks, row-major in the grid."""
        rows, columns = self.made.controller.structure.block
        bands = weight.double().view(weight.shape[0] // rows, rows, -1, columns)
        return bands.square().sum((1, 3)).sqrt().view(-1)


def whole(made: Any) -> Whole:
    """The state of a run now; also that the model computes with it. A collective."""
    shards = made.shards
    shapes = {name: torch.Size(shards.shape(name)) for name in shards.parameters}
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.zeros(len(KINDS), sum(sizes))
    parts = dict(zip(shapes, flat.split(sizes, dim=1)))
    for name, fragment in shards.fragments():
        for kind, part in zip(KINDS, parts[name]):
            part[fragment.start : fragment.start + fragment.numel] = fragment.tensors()[kind]
    tensors = {
        (kind, name): part.view(shapes[name])
        for kind, row in zip(KINDS, shards.sum_over_ranks(flat))
        for name, part in zip(shapes, row.split(sizes))
    }
    for name in shapes:
        for start, copy in model_weights(made, name):
            master = tensors["master", name].view(-1)[start : start + copy.numel()]
            assert torch.equal(copy, master.to(copy.dtype)), f"the model's {name} is another"
    digest, steps = made.controller.digest(), optimizer_steps(made.optimizer)
    return Whole(tensors, masks(made), asdict(made.state), steps, digest)


def session(
    corpus: str, out: str, config_changes: dict[str, Any], look_at: tuple[int, ...] = ()
) -> Session:
    """One session of a run, recorded; `look_at`: steps before which to keep the whole state.

    The last of them may be the step behind the session's last. Rank 0 returns all of it, the others
    what is theirs. What was loaded must be there at once, and through the dry step.
    """
    seen = Session()
    with trainer(run_config(corpus, out, **config_changes)) as made:
        watched = made.controller.method = Watched(made, seen)
        inner, say, load = made._step, made.metrics.say, made.load
        loaded: list[Whole] = []

        def step_and_record(step: int, batches: Any) -> Any:
            watched.step = step
            if step in look_at:
                seen.before[step] = whole(made)
                assert all(differences(at_once, seen.before[step]) == [] for at_once in loaded)
                loaded.clear()
                seen.generators[step] = torch.get_rng_state().numpy().tobytes()
            health, update = inner(step, recorded(step, batches))
            seen.losses[step], seen.norms[step] = health.loss, health.grad_norm
            seen.rates[step] = made.optimizer.param_groups[0]["lr"]
            seen.masks[step] = masks(made)
            assert (update is not None) == (step in seen.updates)
            return health, update

        def recorded(step: int, batches: Any) -> Any:
            for batch in batches:
                seen.batches.setdefault(step, []).append(batch["input_ids"].tolist())
                yield batch

        def load_and_look(path: Path) -> Any:
            manifest = load(path)
            loaded.append(whole(made))
            return manifest

        def heard(message: str) -> None:
            seen.said.append(message)
            say(message)

        made._step, made.metrics.say, made.load = step_and_record, heard, load_and_look
        made.fit()
        seen.state = asdict(made.state)
        if made.state.step + 1 in look_at:
            seen.before[made.state.step + 1] = whole(made)
    if torch.distributed.get_rank():
        seen.before, seen.masks, seen.updates = {}, {}, {}
    return seen


def samples(ranks: list[Session], step: int) -> list[Any]:
    """The sequences of a step over all ranks: micro-step by micro-step, rank by rank."""
    micro_steps = zip(*(rank.batches[step] for rank in ranks), strict=True)
    return [row for micro_step in micro_steps for batch in micro_step for row in batch]


def differences(one: Whole, other: Whole) -> list[str]:
    """What is not the same in two states, bit for bit."""
    found = [
        key for key in ("state", "adam_steps", "digest") if getattr(one, key) != getattr(other, key)
    ]
    pairs: list[tuple[dict[Any, Tensor], dict[Any, Tensor]]]
    pairs = [(one.tensors, other.tensors), (one.masks, other.masks)]
    for mine, theirs in pairs:
        found += map(str, mine.keys() ^ theirs.keys())
        common = mine.keys() & theirs.keys()
        found += [str(key) for key in common if not torch.equal(mine[key], theirs[key])]
    return found


def distance(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> float:
    """Norm of the difference of two sets of tensors, over the norm of the first."""
    assert one.keys() == other.keys()
    first, second = (torch.cat([d[key].double().view(-1) for key in one]) for d in (one, other))
    return float((first - second).norm() / first.norm())


def iou(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Blocks in both sets of masks over blocks in either."""
    assert one.keys() == other.keys()
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    return both / sum(int((one[name] | other[name]).sum()) for name in one)


@dataclass
class Selection:
    """What an update compared in one layer, or over the model, and where it drew the lines."""

    active: Tensor
    update: Update
    names: list[str]

    def __post_init__(self) -> None:
        self.magnitude = joined(self.update.magnitude, self.names)
        self.growth = joined(self.update.growth, self.names)
        count = int(self.update.fraction * int(self.active.sum()))
        self.dropped = self.magnitude[self.active].kthvalue(count).values
        self.kept = self.active & (self.magnitude > self.dropped)
        self.grown = self.growth[~self.kept].topk(count).values[-1]
        self.chosen = self.kept | (~self.kept & (self.growth >= self.grown))

    def near(self, tolerance: float) -> Tensor:
        """bool: active blocks whose magnitude, and free ones whose growth, is about the line's."""
        near = self.active & ((self.magnitude - self.dropped).abs() <= tolerance * self.dropped)
        if not self.update.random:
            near |= ~self.kept & ((self.growth - self.grown).abs() <= tolerance * self.grown)
        return near


def joined(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].view(-1) for name in names])


def update_problems(
    mine: Session, theirs: Session, step: int, tolerance: float, whole_model: bool = False
) -> list[str]:
    """Where the masks after an update differ by more than rounding: a line a layer.

    A position may differ if in either run its score is within `tolerance` of the line between
    chosen and not, relative to it; at random growth, if it lies between the lines of the two. Each
    run's own masks must be those of its scores, but for ties.
    """
    before, problems = mine.before[step].masks, []
    for names in [list(before)] if whole_model else [[name] for name in before]:
        active = joined(before, names)
        sides = [Selection(active, s.updates[step], names) for s in (mine, theirs)]
        after = [joined(s.masks[step], names) for s in (mine, theirs)]
        for side, masks_after in zip(sides, after):
            wrong = int(((side.chosen != masks_after) & ~side.near(1e-9)).sum())
            problems += [f"{names[0]}: {wrong} are not by the scores"] * (wrong > 0)
        near = sides[0].near(tolerance) | sides[1].near(tolerance)
        low, high = sorted(float(side.grown) for side in sides)
        if sides[0].update.random and low < high:
            near |= (sides[0].growth >= low) & (sides[0].growth <= high)
        far = int(((after[0] != after[1]) & ~near).sum())
        problems += [f"{names[0]}: {far} differ far from the line"] * (far > 0)
    return problems


def saved_at(run: Path, step: int, out: Path) -> Path:
    """A new run folder that has one of another's checkpoints, and nothing else."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(run / name, out / name)
    return out
