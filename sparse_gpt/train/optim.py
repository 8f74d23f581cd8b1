"""AdamW that can be held, its parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import nn

from sparse_gpt.config import OptimizerConfig, ScheduleConfig
from sparse_gpt.train.young_weights import YoungWeights


class AdamW(torch.optim.AdamW):
    """torch's AdamW with a `hold`: while it is set, `step` changes nothing.

    Weights, moments and step counts all stay. Zeroed gradients or a learning rate of 0 would
    still move the moments. Used where a topology update replaces the optimizer step (RigL as
    published) and for steps with non-finite gradients.

    `on_stepped`, if set, is called at the end of every `step`, held or not: behind Adam's
    arithmetic, with gradients still there, and before DeepSpeed hands the new weights to the
    model. That is where the topology changes. DeepSpeed may make several steps in one.
    """

    hold = False
    on_stepped: Callable[[], None] | None = None
    young: YoungWeights | None = None  # grown weights, with steps of their own (SMET)
    phase = 0  # groups marked with a later `phase` are not stepped: not even their step counts

    def step(self, closure: Any = None) -> Any:
        result = None if self.hold else self._step(closure)
        if self.on_stepped is not None:
            self.on_stepped()
        return result

    @torch.no_grad()
    def _step(self, closure: Any) -> Any:
        every = self.param_groups
        self.param_groups = [group for group in every if group.get("phase", 0) <= self.phase]
        before = None if self.young is None else self.young.before_step(self)
        result = super().step(closure)
        if self.young is not None and before is not None:
            self.young.after_step(before)
        self.param_groups = every
        return result


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    apart: Container[str] = (),
    phase_of: Callable[[str], int] | None = None,
) -> list[dict[str, Any]]:
    """Two groups: linear weights decay; biases, LayerNorms and embeddings do not.

    The linear weights named in `apart` are a group of their own, marked `by_density`. With
    `phase_of` each of these is a group a phase, marked `phase`, the first phase first.
    """
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    kinds: list[dict[str, Any]] = [
        {"weight_decay": weight_decay, "by_density": True},
        {"weight_decay": weight_decay},
        {"weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        linear = ".attn." in name or ".mlp." in name or name.startswith("project_")
        matrix = name.endswith(".weight") and linear
        kind, phase = (0 if name in apart else 1) if matrix else 2, 0
        marks = dict(kinds[kind])
        if phase_of is not None:
            marks["phase"] = phase = phase_of(name)
        groups.setdefault((phase, kind), {"params": [], **marks})["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    sparse: Container[str] = (),
    phase_of: Callable[[str], int] | None = None,
) -> AdamW:
    """The optimizer of a run; the learning rate is set before every step.

    `sparse`: weights of sparse layers, whose learning rate `growth: smet` scales. `phase_of`: when
    a parameter begins to train, by its name.

    It starts at 0 because DeepSpeed makes an empty first step at some stages: `prime_optimizer`
    undoes what that leaves behind.
    """
    return AdamW(
        parameter_groups(
            model, config.weight_decay, sparse if config.growth == "smet" else (), phase_of
        ),
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def prime_optimizer(optimizer: AdamW, masters: Iterable[torch.Tensor]) -> None:
    """Give every master tensor its Adam state, at step 0 with zero moments.

    Torch makes the state in the first step; checkpoints and topology need it before.
    """
    for tensor in masters:
        state = optimizer.state[tensor]
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor)
        state["exp_avg_sq"] = torch.zeros_like(tensor)


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps taken so far (the same for every tensor, but for those that were frozen)."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def steps_by_phase(optimizer: torch.optim.Optimizer) -> list[int] | None:
    """Steps taken so far by the parameters of each phase; None without phases."""
    groups = [group for group in optimizer.param_groups if "phase" in group]
    if not groups:
        return None
    steps = [0] * (1 + max(group["phase"] for group in groups))
    for group in groups:
        for tensor in group["params"]:
            steps[group["phase"]] = int(optimizer.state[tensor]["step"])
    return steps


def set_optimizer_steps(
    optimizer: torch.optim.Optimizer, steps: int, by_phase: list[int] | None = None
) -> None:
    """Set Adam's step counts, which bias correction depends on."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)
    for group in optimizer.param_groups if by_phase is not None else ():
        for tensor in group["params"]:
            optimizer.state[tensor]["step"].fill_((by_phase or [])[group["phase"]])


def learning_rate(
    config: ScheduleConfig, peak: float, step: int, warmup_steps: int, total_steps: int
) -> float:
    """Learning rate of step t (from 1): t / warmup * peak, then down to `min_lr_ratio * peak`.

    The last step of a cosine or linear schedule has exactly the minimum.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    low = config.min_lr_ratio * peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if config.type == "constant":
        return peak
    if config.type == "cosine":
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.type == "linear":
        return peak + (low - peak) * progress
    decay_steps = max(1, math.ceil(config.decay_fraction * total_steps))
    return peak + (low - peak) * max(
        0.0, min(1.0, (step - total_steps + decay_steps) / decay_steps)
    )
