"""What topology updates of a run will cost on different numbers of GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_gpt.errors import UserError
from sparse_gpt.plan import Plan, bytes_text


@dataclass(frozen=True)
class Cluster:
    """What times are estimated from: a GPU's memory and network in bytes/s, its peak in FLOP/s.

    `latency`: seconds an exchange takes however small; `launch`: to start an operation; `mfu`:
    share of the peak that training reaches. The defaults are an H100 SXM in
    bf16 with 400 Gbit/s of network a GPU.
    """

    memory: float = 3.35e12
    network: float = 50e9
    latency: float = 50e-6
    launch: float = 5e-6
    peak: float = 989e12
    mfu: float = 0.4


def update_table(plans: Sequence[Plan], cluster: Cluster) -> str:
    """Topology updates of one run on different numbers of GPUs, a line a number.

    Exchanges and bytes follow the code; times follow from them and the cluster's figures, and were
    not measured on a GPU. The training step is what masked storage computes.
    """
    head = (
        f"  {'GPUs':>6} {'exchanges':>9} {'sent/layer':>11} {'sent':>10} {'extra memory':>13} "
        f"{'update':>10} {'/Adam':>6} {'step':>10} {'of training':>11}"
    )
    lines = [
        f"topology updates: {plans[0].name}, {plans[0].parameters:,} parameters, "
        f"{plans[0].algorithm}, every {plans[0].update_freq} steps, ZeRO {plans[0].zero_stage}",
        f"  estimated for {cluster.memory / 1e9:.0f} GB/s memory, {cluster.network / 1e9:g} GB/s "
        f"network and {cluster.peak / 1e12:.0f} TFLOP/s a GPU at {cluster.mfu:.0%}, "
        f"{cluster.latency * 1e6:g} us an exchange, {cluster.launch * 1e6:g} us an operation",
        head,
    ]
    for plan in plans:
        cost = plan.update
        if cost is None:
            raise UserError(
                "sparsity: this run has no topology updates to estimate"
                if plan.storage == "masked"
                else "sparsity.storage: compact: its updates are not estimated; set masked"
            )
        seconds = cost.seconds(cluster.memory, cluster.network, cluster.latency, cluster.launch)
        tokens = plan.global_batch_size * plan.seq_len
        flops = tokens * plan.masked_flops_per_token
        step = flops / (plan.ranks * cluster.peak * cluster.mfu)
        share = seconds / (plan.update_freq * step + seconds)
        layers = plan.sparse_layers
        lines.append(
            f"  {plan.ranks:>6} {cost.exchanges:>9} {bytes_text(cost.sent // layers):>11} "
            f"{bytes_text(cost.sent):>10} {bytes_text(cost.extra):>13} {_time(seconds):>10} "
            f"{seconds / (cost.adam / cluster.memory):>5.1f}x {_time(step):>10} {share:>11.4%}"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
