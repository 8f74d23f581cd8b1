"""Stand-ins for slurm's commands, and the Kubernetes manifest as commands."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.launcher import BIN
from tests.multi_node.network import Network
from tests.ranks import ROOT

# One task a node; the exit code is the highest.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
{tasks}
highest=0
for task in "${{tasks[@]}}"; do
    code=0
    wait "$task" || code=$?
    ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf '%s\\n' {hosts} ;;
    requeue*) echo "$2" >> {requeued} ;;
    *) exit 1 ;;
esac
"""


def write_command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def search_path(folder: Path) -> dict[str, str]:
    """PATH with `folder` first, then the virtual environment."""
    return {"PATH": os.pathsep.join([str(folder), str(BIN), os.environ["PATH"]])}


def fake_slurm(folder: Path, network: Network, task: str = '"$@"') -> dict[str, str]:
    """srun and scontrol in `folder`/bin, and the environment that slurm gives a batch script.

    `task` is what srun runs on each node. The jobs that scontrol was asked to queue again are in
    `folder`/requeued.
    """
    tasks = [
        f"SLURM_NODEID={rank} {shlex.join(node.command([], ROOT))} {task} & tasks+=($!)"
        for rank, node in enumerate(network.nodes)
    ]
    write_command(folder / "bin", "srun", SRUN.format(tasks="\n".join(tasks)))
    hosts = shlex.join(network.name(node, node.name) for node in network.nodes)
    requeued = shlex.quote(str(folder / "requeued"))
    write_command(folder / "bin", "scontrol", SCONTROL.format(hosts=hosts, requeued=requeued))
    environment = search_path(folder / "bin") | {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": str(len(network.nodes)),
        "SLURM_GPUS_ON_NODE": "1",
    }
    if network.why_loopback:
        environment["MASTER_PORT"] = str(network.free_port())
    return environment


def manifest() -> dict[str, dict[str, Any]]:
    """The documents of the Kubernetes manifest, by kind."""
    documents = yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def after_a_failure(code: int, evicted: bool) -> str:
    """What the manifest's Job does when a pod has ended so: its first rule that fits."""
    for rule in manifest()["Job"]["spec"]["podFailurePolicy"]["rules"]:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        assert (codes is None) != (conditions is None)
        if conditions:
            assert conditions == [{"type": "DisruptionTarget", "status": "True"}]
            fits = evicted
        else:
            assert codes["operator"] == "In"
            fits = code in codes["values"]
        if fits:
            return rule["action"]
    return "Count"


def dockerfile(instruction: str) -> str:
    """The rest of the Dockerfile's last line that begins with that instruction."""
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{instruction} ")][-1]


def pod(
    container: Mapping[str, Any], index: int, changes: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command of the pod with that completion index, and its environment."""
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    command = [*json.loads(dockerfile("ENTRYPOINT")), *container["args"]]
    return command, environment | {"JOB_COMPLETION_INDEX": str(index)} | dict(changes)
