"""The real command with a hostfile: DeepSpeed starts the other node itself, with pdsh over ssh."""

import json

import pytest

from tests.launcher import BIN, Launch
from tests.multi_node.remote import ssh_environment
from tests.multi_node.runs import (
    SCRIPT,
    STEPS,
    curve,
    digests,
    reported,
    write_config,
    write_hostfile,
    write_report,
)
from tests.ranks import ROOT

pytestmark = pytest.mark.launcher


def over_ssh(network, folder, words, env):
    """`deepspeed` with a hostfile, on node 0 and in the repository."""
    command = [str(BIN / "deepspeed"), "--hostfile", str(write_hostfile(folder, network))]
    if network.why_loopback:  # else it asks node 0 for its address
        command += ["--master_addr", "127.0.0.1", "--master_port", str(network.free_port())]
    words = network.nodes[0].command([*command, *map(str, words)], ROOT)
    return Launch(words, env, ROOT)


def test_what_reaches_the_nodes_and_what_comes_back(network, tmp_path):
    env = ssh_environment(tmp_path, network) | {"GIVEN": "not passed on"}
    (tmp_path / "home/.deepspeed_env").write_text("GIVEN=from the file\n")
    args = ["a=b", "two words"]
    with over_ssh(network, tmp_path, [write_report(tmp_path), *args], env) as launch:
        result = launch.wait(120)
    assert result.returncode == 3, result.stdout  # the highest of the nodes'
    for rank, node in enumerate(network.nodes):
        assert f"{node.name}: {reported(node, args, rank, 'from the file')}" in result.stdout


def test_over_ssh_two_nodes_train_what_one_node_trains(network, one_node, tmp_path, corpus):
    config, env = write_config(tmp_path, corpus), ssh_environment(tmp_path, network)
    passed_on = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    if network.why_loopback:
        passed_on["GLOO_SOCKET_IFNAME"] = "lo"
    lines = [f"{key}={value}\n" for key, value in passed_on.items()]
    (tmp_path / "home/.deepspeed_env").write_text("".join(lines))
    with over_ssh(network, tmp_path, [SCRIPT, config], env) as launch:
        result = launch.wait()
    assert result.returncode == 0, result.stdout
    assert f"node0: train      step {STEPS}/{STEPS}" in result.stdout
    run = tmp_path / "run"
    assert json.loads((run / "environment.json").read_text())["threads"] == 1
    assert curve(run) == curve(one_node)
    assert digests(run) == digests(one_node)
