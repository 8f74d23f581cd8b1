"""Three small layers under the controller, and the same run in plain Python.

`Driven` is what is tested: a `TopologyController` over plain tensors, called as the training loop
calls it, around SGD with momentum. `Plain` is its judge: lists, sets and sorts, which the tests
move by the papers' algorithms. Gradients are scripted. Numbers are multiples of powers of two and
every operation is rounded to fp32, so both must come to the same bits.
"""

import math
import random
import struct
from dataclasses import dataclass, field

import torch

from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.random import random_scores
from sparse_gpt.topology.shards import Fragment
from sparse_gpt.topology.structure import BlockStructure

SHAPES = {"a": (4, 12), "b": (8, 6), "c": (2, 16)}
RATE, MOMENTUM = 1 / 8, 1 / 2
SEED = 7
SINGLE, BLOCK = (1, 1), (2, 2)
Unit = tuple[str, int]  # layer, and canonical index in its grid


def f32(value: float) -> float:
    """Rounded to fp32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def drawn(what: str, name: str) -> list[float]:
    """A layer's values, of few levels: there are ties."""
    generator = random.Random(f"{what}/{name}")
    return [generator.randint(-24, 24) / 16 for _ in range(math.prod(SHAPES[name]))]


def totals(block=SINGLE) -> dict[str, int]:
    return {name: math.prod(shape) // math.prod(block) for name, shape in SHAPES.items()}


def gradient(step: int, name: str) -> list[float]:
    """The dense gradient of step t."""
    return drawn(f"gradient {step}", name)


class _Layer:
    pattern = None
    dense_grad = False
    alpha = 1.0


class _Shards:
    """All of every layer on one rank; moments are SGD's: its momentum, and a sum beside it."""

    replicated = False
    device = state_device = torch.device("cpu")

    def __init__(self) -> None:
        self.fragments, self.gradients = {}, {}
        for name in SHAPES:
            master = torch.tensor(drawn("weights", name))
            zero = torch.zeros_like(master)
            self.fragments[name] = Fragment(0, master, zero, zero.clone())
            self.gradients[name] = zero.clone()

    def batches(self):
        return [list(SHAPES)]

    def settle(self):
        pass

    def shape(self, name):
        return SHAPES[name]

    def fragment(self, name):
        return self.fragments[name]

    def gradient(self, name):
        return self.gradients[name]

    def stepped_gradient(self, fragment):
        return next(self.gradients[n] for n, f in self.fragments.items() if f is fragment)

    def sum_over_ranks(self, values):
        return values

    max_over_ranks = sum_over_ranks


class _Optimizer:
    on_stepped = None


class Driven:
    """The controller of a method, driven as `Trainer._step` does."""

    def __init__(self, method, targets, block=SINGLE, whole_model=False, replace=False) -> None:
        self.shards, self.optimizer = _Shards(), _Optimizer()
        self.layers = {name: _Layer() for name in SHAPES}
        self.targets, self.method = targets, method
        self.controller = TopologyController(
            self.layers, targets, BlockStructure(block), method, SEED, self.shards,
            whole_model=whole_model, hold_step=replace,
        )  # fmt: skip

    def step(self, step: int, broken: bool = False):
        """Step t; `broken`: its gradient has an infinity. Returns the update's report."""
        made, shards = self.controller, self.shards
        made.begin_step(step)
        self.weights = made.step_weights(step)
        for name in SHAPES:
            # Kernels make dW of active weights only, unless they are asked for more.
            shards.gradients[name].copy_(torch.tensor(gradient(step, name)))
            if not self.layers[name].dense_grad:
                made.masks[name].zero_outside_(shards.gradients[name], 0)
        if broken:
            shards.gradients["b"][5] = math.inf
            if not self.layers["b"].dense_grad:
                shards.gradients["b"].fill_(math.inf)
        finite = bool(made.before_step(step))
        assert finite == (not broken)
        hold = broken or made.holds_step(step)
        made.arm(step, finite, self.optimizer)
        for name, fragment in shards.fragments.items() if not hold else ():
            fragment.exp_avg.mul_(MOMENTUM).add_(shards.gradients[name])
            fragment.exp_avg_sq.mul_(MOMENTUM).add_(shards.gradients[name].abs())
            fragment.master.sub_(fragment.exp_avg * RATE)
        if self.optimizer.on_stepped is not None:
            self.optimizer.on_stepped()
        return made.after_step(self.optimizer)

    def set_of(self, masks) -> set[Unit]:
        return {(name, i) for name in masks for i in masks[name].bits.positions().tolist()}

    @property
    def forward(self) -> set[Unit]:
        return self.set_of(self.controller.masks)

    @property
    def trained(self) -> set[Unit] | None:
        """B, where it is a set of its own."""
        trained = self.controller.trained
        return self.set_of(trained) if trained else None

    def values(self, kind: str) -> dict[str, list[float]]:
        return {n: f.tensors()[kind].tolist() for n, f in self.shards.fragments.items()}


@dataclass
class Plain:
    """Weights and moments as lists, by layer; `active` is A. Units are single weights or blocks."""

    block: tuple[int, int] = SINGLE
    whole_model: bool = False
    w: dict[str, list[float]] = field(
        default_factory=lambda: {n: drawn("weights", n) for n in SHAPES}
    )
    m: dict[str, list[float]] = field(default_factory=lambda: _zeros())
    v: dict[str, list[float]] = field(default_factory=lambda: _zeros())
    active: set[Unit] = field(default_factory=set)

    @property
    def everything(self) -> set[Unit]:
        return {(name, i) for name, count in totals(self.block).items() for i in range(count)}

    def groups(self) -> list[list[str]]:
        """Layers that are compared with each other."""
        return [list(SHAPES)] if self.whole_model else [[name] for name in SHAPES]

    def elements(self, unit: Unit) -> list[int]:
        """Places of a unit's weights in the flat weight."""
        name, index = unit
        width, (rows, columns) = SHAPES[name][1], self.block
        row, column = divmod(index, width // columns)
        return [
            (row * rows + r) * width + column * columns + c
            for r in range(rows)
            for c in range(columns)
        ]

    def norm(self, values: dict[str, list[float]], unit: Unit) -> float:
        """Squared L2 norm of a unit: exact in fp64 for what occurs here."""
        return sum(values[unit[0]][i] ** 2 for i in self.elements(unit))

    def top(self, of: set[Unit], count: int, score) -> set[Unit]:
        """The first `count` units by a score, ties by layer and index."""
        assert 0 <= count <= len(of)
        return set(sorted(of, key=lambda unit: (-score(unit), unit))[:count])

    def top_each(self, of: set[Unit], counts: dict[str, int], score) -> set[Unit]:
        """The same a layer, or with the sum of all counts in the whole model."""
        return set().union(
            *(
                self.top({u for u in of if u[0] in group}, sum(counts[n] for n in group), score)
                for group in self.groups()
            )
        )

    def drop_each(self, of: set[Unit], fraction: float, score) -> tuple[set[Unit], dict]:
        """Without the smallest; and how many were dropped, by a group's first layer."""
        kept, dropped = set(), {}
        for group in self.groups():
            members = {u for u in of if u[0] in group}
            dropped[group[0]] = int(fraction * len(members))
            order = sorted(members, key=lambda unit: (score(unit), unit))
            kept |= set(order[dropped[group[0]] :])
        return kept, dropped

    def grow_each(self, kept: set[Unit], many: dict, score) -> set[Unit]:
        new = set(kept)
        for group in self.groups():
            free = {u for u in self.everything - kept if u[0] in group}
            new |= self.top(free, many[group[0]], score)
        return new

    def magnitude(self, unit: Unit) -> float:
        return self.norm(self.w, unit)

    def chance(self, index: int):
        """The random score of units in a numbered choice: a pure function with its own tests."""
        table = {
            name: random_scores(SEED, index, name, 0, count).tolist()
            for name, count in totals(self.block).items()
        }
        return lambda unit: table[unit[0]][unit[1]]

    def growth(self, step: int):
        dense = {name: gradient(step, name) for name in SHAPES}
        return lambda unit: self.norm(dense, unit)

    def random_start(self, counts: dict[str, int]) -> None:
        """A random mask of exact counts in every layer; the rest is 0."""
        score = self.chance(0)
        for name in SHAPES:
            of = {u for u in self.everything if u[0] == name}
            self.active |= self.top(of, counts[name], score)
        self.clear(self.everything - self.active)

    def optimize(self, step: int, trained: set[Unit], extra=lambda unit, place: 0.0) -> None:
        """SGD with momentum on some units; `extra` joins the gradient. Others do not move."""
        for unit in trained:
            name = unit[0]
            w, m, v, g = self.w[name], self.m[name], self.v[name], gradient(step, name)
            for i in self.elements(unit):
                slope = f32(g[i] + f32(extra(unit, i)))
                m[i] = f32(MOMENTUM * m[i] + slope)
                v[i] = f32(MOMENTUM * v[i] + abs(slope))
                w[i] = f32(w[i] - RATE * m[i])

    def clear(self, units: set[Unit], kinds: str = "wmv") -> None:
        for unit in units:
            for kind in kinds:
                values = getattr(self, kind)[unit[0]]
                for i in self.elements(unit):
                    values[i] = 0.0

    def move(self, new: set[Unit]) -> None:
        """New active units, where only those have values: what leaves, and what comes, is 0."""
        self.clear(self.active ^ new)
        self.active = new

    def check(self, driven: Driven, trained: set[Unit] | None = None) -> None:
        """Masks, masters and moments are the same, to the bit."""
        assert driven.forward == self.active
        assert driven.trained == trained
        for kind, mine in (("master", self.w), ("exp_avg", self.m), ("exp_avg_sq", self.v)):
            assert driven.values(kind) == mine, kind


def _zeros() -> dict[str, list[float]]:
    return {name: [0.0] * math.prod(shape) for name, shape in SHAPES.items()}
