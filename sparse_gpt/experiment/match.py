"""A dense run that costs what another run costs: by its steps, or by its width."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sparse_gpt.config import RunConfig
from sparse_gpt.ift.search import nearest, upper_bound


@dataclass(frozen=True)
class Match:
    """`settings` that bring a run's FLOPs next to those of arm `arm`; `flops` of `target`."""

    arm: str
    by: str
    settings: dict[str, Any]
    target: int
    flops: int

    @property
    def residual(self) -> float:
        """How far the run's FLOPs are from the target, relative to it."""
        return float(Fraction(self.flops, self.target) - 1)

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "arm": self.arm,
            "by": self.by,
            "settings": self.settings,
            "target_flops": self.target,
            "residual": self.residual,
        }


def match_flops(
    configured: Callable[[Mapping[str, Any]], RunConfig],
    cost: Callable[[RunConfig], int],
    by: str,
    arm: str,
    target: int,
    ranks: int,
) -> Match:
    """Steps (`by: tokens`) or widths (`by: width`) at which a run costs nearest to `target`.

    `configured(settings)` is the run with some settings changed, `cost` its whole FLOPs. d_model
    is a multiple of the heads, found with d_ff in its ratio to it; d_ff then makes up what that
    step leaves over.
    """
    base = configured({})
    dims, batch_tokens = base.base_dims, base.batch(ranks) * base.seq_len
    heads, ratio = dims["n_head"], Fraction(dims["d_ff"], dims["d_model"])

    def settings(number: int) -> dict[str, Any]:
        if by == "width":
            return {"model.d_model": number * heads, "model.d_ff": round(ratio * number * heads)}
        if base.max_steps is not None:
            return {"max_steps": number}
        return {"max_tokens": number * batch_tokens}

    def flops(number: int) -> int:
        return cost(configured(settings(number)))

    start = dims["d_model"] // heads if by == "width" else base.total_steps(ranks)
    found = settings(nearest(flops, target, 1, upper_bound(flops, target, start)))
    if by == "width":

        def inner_flops(width: int) -> int:
            return cost(configured({**found, "model.d_ff": width}))

        last = upper_bound(inner_flops, target, found["model.d_ff"])
        found["model.d_ff"] = nearest(inner_flops, target, 1, last)
    return Match(arm, by, found, target, cost(configured(found)))
