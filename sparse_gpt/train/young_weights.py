"""SMET's rule for weights that have just grown (Xiao et al. 2026, arXiv 2606.00888).

A grown weight starts with zero moments. With Adam's global step count t its moments count as
unbiased at once, and with beta2 > beta1^2 its first updates come out several times too large. SMET
counts the steps a of each grown weight by itself, and warms its learning rate up over W of them:

    m, v as Adam's;  lr_a = min(1, a / W) lr
    w <- (1 - lr_a decay) w - lr_a * m / (1 - beta1^a) / (sqrt(v / (1 - beta2^a)) + eps)

Besides, the weights of sparse layers train at lr / d, d the share of them that is active now (the
authors' code divides by the density; their dense learning rate is `optimizer.lr`).

State is kept of young weights alone: where they are, and at which optimizer step they were born. A
weight is young until its warmup is over and its own bias corrections are within 0.1 % of none.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_gpt.topology.bits import Bits, chunks
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.topology.shards import Fragment, Shards

SETTLED = 1e-3  # beta^age at which a bias correction no longer matters


@dataclass(frozen=True)
class Young:
    """Young weights of one fragment: positions in it, int64 `[n]`, and the steps before birth."""

    positions: Tensor
    births: Tensor

    def keep(self, which: Tensor) -> "Young":
        """Those where a bool tensor is True."""
        return Young(self.positions[which], self.births[which])


@dataclass(frozen=True)
class _Before:
    """Young weights of a fragment before Adam's arithmetic, and the group that steps them."""

    fragment: Fragment
    group: dict[str, Any]
    state: dict[str, Tensor]
    young: Young
    weights: Tensor


class YoungWeights:
    """The young weights of a run, and their part of an optimizer step.

    `warmup`: W, in optimizer steps. All tensors lie where masters do.
    """

    def __init__(self, shards: Shards, warmup: int, betas: tuple[float, float]) -> None:
        self.shards, self.warmup = shards, warmup
        largest = max(betas)
        settled = math.ceil(math.log(SETTLED) / math.log(largest)) if largest > 0 else 0
        self.grown_up = max(warmup, settled)  # an age at which Adam's own step is as good
        self.layers: dict[str, Young] = {}

    def move(self, name: str, grown: Bits, mask: LayerMask, steps: int) -> None:
        """A topology update after `steps` optimizer steps: units `grown`, and `mask` since then.

        What is not in the mask any more, or has grown up, is forgotten.
        """
        fragment = self.shards.fragment(name)
        if fragment is None:
            return
        new = _positions(replace(mask, bits=grown), fragment)
        young = Young(new, torch.full_like(new, steps))
        if name in self.layers:
            old = self.layers[name]
            inside = torch.zeros(fragment.numel, dtype=torch.bool, device=new.device)
            inside[_positions(mask, fragment)] = True
            old = old.keep(inside[old.positions] & (steps - old.births < self.grown_up))
            young = Young(
                torch.cat([old.positions, young.positions]), torch.cat([old.births, young.births])
            )
        self.layers[name] = young

    def before_step(self, optimizer: torch.optim.Optimizer) -> list[_Before]:
        """Remember the young weights that the step will move; to be handed to `after_step`."""
        found = []
        for name, young in self.layers.items():
            fragment = self.shards.fragment(name)
            if fragment is None or not young.positions.numel():
                continue
            stepped = self.shards.stepped(fragment)
            if stepped is None:
                continue
            group, flat, _ = stepped
            young = young.keep(_steps(optimizer.state[flat]) - young.births < self.grown_up)
            self.layers[name] = young
            weights = fragment.master[young.positions]
            found.append(_Before(fragment, group, optimizer.state[flat], young, weights))
        return found

    def after_step(self, before: Iterable[_Before]) -> None:
        """Put SMET's update in the place of Adam's, whose moments stay as they are."""
        for old in before:
            at, group = old.young.positions, old.group
            age = (_steps(old.state) - old.young.births).double()
            beta1, beta2 = group["betas"]
            lr = group["lr"] * (age / self.warmup).clamp_(max=1.0)
            moment = old.fragment.exp_avg[at].double() / (1 - beta1**age)
            square = old.fragment.exp_avg_sq[at].double() / (1 - beta2**age)
            weights = old.weights.double() * (1 - lr * group["weight_decay"])
            weights -= lr * moment / (square.sqrt_() + group["eps"])
            old.fragment.master[at] = weights.to(old.fragment.master.dtype)

    def load(self, name: str, positions: Tensor, births: Tensor) -> None:
        """Young weights of a layer from a checkpoint, of any ranks: positions in the layer."""
        fragment = self.shards.fragment(name)
        if fragment is None:
            return
        mine = (positions >= fragment.start) & (positions < fragment.start + fragment.numel)
        young = Young(positions - fragment.start, births).keep(mine)
        device = self.shards.state_device
        self.layers[name] = Young(young.positions.to(device), young.births.to(device))


def _steps(state: dict[str, Tensor]) -> int:
    return int(state["step"])


def _positions(mask: LayerMask, fragment: Fragment) -> Tensor:
    """Positions in a fragment of the weights inside a mask, int64, ascending."""
    found = []
    for start, stop in chunks(fragment.numel, mask.bits.data.device):
        flags = mask.flags(fragment.start + start, fragment.start + stop)
        found.append(flags.nonzero().view(-1) + start)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
