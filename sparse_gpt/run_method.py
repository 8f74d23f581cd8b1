"""The sparse training method of a run: asked by the plan and by the topology."""

from itertools import pairwise
from typing import Any

from sparse_gpt.config import RunConfig
from sparse_gpt.errors import UserError
from sparse_gpt.model.flops import fraction_of_steps
from sparse_gpt.topology.methods import METHODS, Method
from sparse_gpt.topology.methods.ac_dc import ACDC
from sparse_gpt.topology.schedule import UpdateSchedule


def method_of(config: RunConfig, world_size: int) -> Method:
    """The method `sparsity.algorithm` names, on the schedule of the run.

    Raises `UserError` where the run is too short for what the method has to do in it.
    """
    sparsity, steps = config.sparsity, config.total_steps(world_size)
    schedule = UpdateSchedule(
        freq=sparsity.update.freq,
        stop=config.update_stop(world_size),
        init=sparsity.drop_fraction.init,
        half_period=sparsity.drop_fraction.half_period,
        kind=sparsity.drop_fraction.type,
    )
    given = getattr(sparsity, sparsity.algorithm, None)
    own: dict[str, Any] = {} if given is None else dict(given)
    if sparsity.algorithm == "ac_dc":
        own["total_steps"] = steps
    elif sparsity.algorithm == "search_spaces":
        own["v"] = fraction_of_steps(own["v"], steps)
    method = METHODS[sparsity.algorithm](schedule, **own)
    last = schedule.last_update(schedule.stop)
    if sparsity.algorithm in ("gmp", "granet") and not 0 < last <= steps:
        raise UserError(
            f"sparsity.update: {sparsity.algorithm} reaches its sparsity by updates every "
            f"{schedule.freq} steps before step {schedule.stop}, which a run of {steps} steps has "
            "not; lower sparsity.update.freq or sparsity.update.stop"
        )
    if isinstance(method, ACDC):
        ends = (0, *method.switches, steps)
        if any(later <= earlier for earlier, later in pairwise(ends)):
            raise UserError(
                f"sparsity.ac_dc: a run of {steps} steps has phases without a step; raise "
                "max_steps or max_tokens, or make sparsity.ac_dc.phase (and warmup, last_dense, "
                "last_sparse) larger"
            )
    return method
