"""The records of the log, from what they are made of."""

from typing import Any

from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.interfaces import UpdateReport
from sparse_gpt.train.guard import StepHealth
from sparse_gpt.train.state import TrainState


def step_record(
    state: TrainState,
    health: StepHealth,
    lr: float,
    speed: dict[str, Any],
    controller: TopologyController,
) -> dict[str, Any]:
    """`train`: a step. `speed`: what `Throughput.read` gives."""
    return {
        "loss": health.loss,
        "lr": lr,
        "grad_norm": health.grad_norm,
        "tokens": state.tokens,
        **speed,
        "flops_spent": state.flops_spent,
        "sparsity": _sparsity(controller),
        "skipped_steps": state.skipped_steps,
    }


def first_topology_record(
    init_mask: str, state: TrainState, controller: TopologyController
) -> dict[str, Any]:
    """`topology` of step 0: masks that were found before training."""
    shares = [mask.active / mask.units for mask in controller.masks.values()]
    return {
        "init_mask": init_mask,
        "sparsity": _sparsity(controller),
        "flops_spent": state.flops_spent,
        "least_kept": min(shares),
        "most_kept": max(shares),
    }


def update_record(
    step: int, update: UpdateReport, controller: TopologyController
) -> dict[str, Any]:
    """`topology`: an update."""
    values = {
        "sparsity": _sparsity(controller),
        "churn": update.churn,
        "drop_fraction": controller.method.schedule.drop_fraction(step),
        "dropped": update.dropped,
        "replaced": update.replaced,
    }
    if update.growth_bytes:
        values["growth_mb"] = update.growth_bytes / 1e6
    return values


def _sparsity(controller: TopologyController) -> float:
    active, total = controller.counts()
    return 1.0 - active / total if total else 0.0
