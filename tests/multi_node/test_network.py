"""The two nodes of these tests; skipped, with the reason, where they share the loopback."""

from pathlib import Path

import psutil
import pytest

from tests.multi_node.network import two_nodes


@pytest.fixture
def apart(network):
    if network.why_loopback:
        pytest.skip(network.why_loopback)
    return network.nodes


def test_each_node_has_a_name_and_a_wire_to_the_other(apart):
    for node, other in (apart, apart[::-1]):
        assert node.run("hostname") == node.name
        assert node.run("getent", "hosts", other.name).split()[0] == other.address
        before = other.received_bytes()
        node.run("bash", "-c", f"echo something > /dev/udp/{other.name}/9")
        assert other.received_bytes() >= before + len("something")


def test_each_node_has_a_network_of_its_own(apart):
    links = [node.run("readlink", "/proc/self/ns/net") for node in apart]
    assert len({*links, str(Path("/proc/self/ns/net").readlink())}) == 3


def test_nothing_of_the_nodes_is_left(apart):
    with two_nodes() as others:
        holders = [psutil.Process(node.holder) for node in others.nodes]
        assert not {node.holder for node in others.nodes} & {node.holder for node in apart}
        assert others.hosts.exists()
    assert not [holder for holder in holders if holder.is_running()]
    assert not others.hosts.exists()
