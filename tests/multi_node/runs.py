"""The small run of these tests, started on nodes, and what is compared of it."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tests.launcher import BIN, Launch
from tests.multi_node.network import Network, Node
from tests.ranks import ROOT

SCRIPT = "launch/pretrain.py"
STEPS, EVERY = 30, 5
NODES = 2

# A script that trains nothing, for what a launch passes on and gives back.
REPORT = """
import os, socket, sys

rank = int(os.environ["RANK"])
socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
world = os.environ["WORLD_SIZE"]
print("REPORT", socket.gethostname(), os.getcwd(), sys.argv[2:], f"{rank}/{world}", end=" ")
print(os.environ.get("GIVEN"), flush=True)
sys.exit(3 * rank)
"""


def write_config(folder: Path, corpus: Path, **changes: Any) -> Path:
    """The configuration of a run in `folder`/run: RigL every third step, a save every fifth."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "data": [{"path": str(corpus)}],
        "seq_len": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "precision": "fp32",
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64, "dropout": 0.1},
        "sparsity": {"sparsity": 0.75, "algorithm": "rigl", "update": {"freq": 3}},
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 3},
        "deepspeed": {"zero_stage": 2},
        "checkpoint": {"every": EVERY},
        "evaluation": {"every": 10, "sequences": 8},
        "logging": {"every": 1},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_report(folder: Path) -> Path:
    path = folder / "report.py"
    path.write_text(REPORT)
    return path


def reported(node: Node, args: Sequence[str], rank: int, given: str | None) -> str:
    """What the script above prints on that node, started in the repository."""
    return f"REPORT {node.run('hostname')} {ROOT} {list(args)} {rank}/{NODES} {given}"


def write_hostfile(folder: Path, network: Network, slots: int = 1) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{node.name} slots={slots}\n" for node in network.nodes))
    return path


def launch_on(
    network: Network,
    node: Node,
    command: Sequence[object],
    env: Mapping[str, str] | None = None,
) -> Launch:
    """That command on that node, in the repository; use it in a `with` statement."""
    # In a namespace gloo finds the interface by the host's name, as on a real node.
    gloo = {"GLOO_SOCKET_IFNAME": node.interface if network.why_loopback else ""}
    words = node.command([str(word) for word in command], ROOT)
    return Launch(words, gloo | dict(env or {}), ROOT)


@contextmanager
def launched(network: Network, args: Sequence[object], slots: int = 1) -> Iterator[list[Launch]]:
    """The documented command, without ssh, started on each node."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="sparse_gpt_hostfile_")))
        command: list[object] = [BIN / "deepspeed", "--no_ssh"]
        command += ["--hostfile", write_hostfile(folder, network, slots)]
        command += ["--master_addr", network.name(network.nodes[0], "node0")]
        command += ["--master_port", network.free_port()]
        yield [
            stack.enter_context(
                launch_on(network, node, [*command, "--node_rank", rank, SCRIPT, *args])
            )
            for rank, node in enumerate(network.nodes)
        ]


def finish(launches: Sequence[Launch]) -> list[str]:
    """What each printed; AssertionError where one fails."""
    results = [launch.wait() for launch in launches]
    for result in results:
        assert result.returncode == 0, result.stdout
    return [result.stdout for result in results]


def curve(run: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Every number of the log that is no time."""
    keys = ("loss", "grad_norm", "lr", "sparsity", "churn", "tokens", "flops_spent")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["kind"], r["step"]): tuple(r.get(key) for key in keys) for r in records}


def digests(run: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 of every tensor file of a checkpoint: masters, moments, masks, generators."""
    files = sorted((run / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    assert files, run
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_step(launch: Launch, run: Path, step: int) -> None:
    """Until the log has that step."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert launch.process.poll() is None, launch.output
        assert time.monotonic() < deadline, launch.output
        time.sleep(0.02)
