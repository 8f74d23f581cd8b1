"""Two nodes on one machine: two network namespaces joined by a wire, or both on the loopback.

A namespace here has no name: it lives as long as the process that holds it, whose standard input
is a pipe from this one. So nothing is left behind, however the tests end. Each node has its own
interfaces, host name and /etc/hosts; files are those of the machine, as on a shared file system.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.ranks import free_port

WIRE = "wire0"  # the interface's name in both nodes
NAMES = ("node0", "node1")
USER = ("--user", "--preserve-credentials")  # nsenter's options
ADDRESSES = ("10.213.77.1", "10.213.77.2")


class NoNamespaces(Exception):
    """Network namespaces cannot be made here; the message is the exact reason."""


@dataclass(frozen=True)
class Node:
    """One node; `enter` is put before a command that is to run on it."""

    name: str
    address: str
    interface: str
    enter: tuple[str, ...] = ()
    holder: int | None = None  # the process that holds its namespaces

    def command(self, arguments: Sequence[str], cwd: Path, from_node: bool = False) -> list[str]:
        """That command on this node, in that folder; `from_node`: to be run on one of the two."""
        if not self.enter:
            return list(arguments)
        # No process enters the user namespace that it is in, which the nodes have in common.
        enter = [word for word in self.enter if not (from_node and word in USER)]
        # Entering a mount namespace moves to its root.
        script = f'cd {shlex.quote(str(cwd))} && exec "$@"'
        return [*enter, "sh", "-c", script, "sh", *arguments]

    def run(self, *arguments: str) -> str:
        """Run a command on this node; its output. Raises CalledProcessError."""
        return _checked(self.command(arguments, Path("/"))).strip()

    def received_bytes(self) -> int:
        """What has come in over the interface."""
        table = Path(f"/proc/{self.holder or 'self'}/net/dev").read_text()
        for line in table.splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == self.interface:
                return int(counters.split()[0])
        raise ValueError(f"{self.name} has no interface {self.interface}:\n{table}")


@dataclass(frozen=True)
class Network:
    """Two nodes; `why_loopback` is empty where they are real namespaces."""

    nodes: tuple[Node, Node]
    hosts: Path  # the /etc/hosts of both nodes
    why_loopback: str = ""

    def name(self, node: Node, name: str) -> str:
        """A name by which both nodes find that node: `name`, or its address on the loopback."""
        if self.why_loopback:
            return node.address
        line = f"{node.address} {name}\n"
        if line not in self.hosts.read_text():
            with self.hosts.open("a") as hosts:
                hosts.write(line)
        return name

    def free_port(self) -> int:
        """A port for the ranks to meet at; every namespace has all of them."""
        return free_port() if self.why_loopback else 29500


@contextmanager
def two_nodes() -> Iterator[Network]:
    """Two namespaces if they can be made, else two nodes that share the loopback interface."""
    with ExitStack() as stack:
        hosts = Path(stack.enter_context(TemporaryDirectory(prefix="sparse_gpt_nodes_"))) / "hosts"
        hosts.write_text("127.0.0.1 localhost\n")
        why_loopback = ""
        try:
            nodes = _namespaces(stack.enter_context(ExitStack()), hosts)
        except NoNamespaces as reason:
            why_loopback = f"no network namespaces: {reason}"
            nodes = (Node(NAMES[0], "127.0.0.1", "lo"), Node(NAMES[1], "127.0.0.1", "lo"))
        network = Network(nodes, hosts, why_loopback)
        for node in nodes:
            network.name(node, node.name)
        yield network


def _namespaces(stack: ExitStack, hosts: Path) -> tuple[Node, Node]:
    for tool in ("unshare", "nsenter", "ip", "mount", "hostname"):
        if shutil.which(tool) is None:
            raise NoNamespaces(f"the command {tool} is not installed")
    as_root = os.geteuid() == 0
    # Without root, a user namespace in which we are; the second node is made inside it.
    first = _hold(stack, [] if as_root else ["--user", "--map-root-user"], ())
    user = () if as_root else USER
    nodes = []
    for index, name in enumerate(NAMES):
        holder = first if index == 0 else _hold(stack, [], (*_enter(first, user),))
        enter = _enter(holder, user)
        nodes.append(Node(name, ADDRESSES[index], WIRE, enter, holder))
    wire = ["ip", "link", "add", WIRE, "type", "veth", "peer", "name", WIRE]
    _make([*nodes[0].enter, *wire, "netns", str(nodes[1].holder)])
    for node in nodes:
        _make([*node.enter, "ip", "link", "set", "lo", "up"])
        _make([*node.enter, "ip", "address", "add", f"{node.address}/24", "dev", WIRE])
        _make([*node.enter, "ip", "link", "set", WIRE, "up"])
        _make([*node.enter, "hostname", node.name])
        _make([*node.enter, "mount", "--bind", str(hosts), "/etc/hosts"])
    return nodes[0], nodes[1]


def _enter(holder: int, user: Sequence[str]) -> tuple[str, ...]:
    return ("nsenter", "--target", str(holder), *user, "--net", "--mount", "--uts", "--")


def _hold(stack: ExitStack, user: Sequence[str], inside: Sequence[str]) -> int:
    """A process in new namespaces, until our end of its standard input is closed; its id."""
    arguments = [*inside, "unshare", *user, "--net", "--mount", "--uts", "--", "sh", "-c"]
    process = subprocess.Popen(
        # exec's on the way keep the process id
        [*arguments, "echo here; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stack.callback(_let_go, process)
    said = process.stdout.readline()
    if said != "here\n":
        raise NoNamespaces(f"{said.strip()}")
    return process.pid


def _let_go(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _make(arguments: Sequence[str]) -> None:
    try:
        _checked(arguments)
    except subprocess.CalledProcessError as error:
        reason = f"{shlex.join(error.cmd[-6:])}: {error.output.strip()}"
        raise NoNamespaces(reason) from error


def _checked(arguments: Sequence[str]) -> str:
    return subprocess.run(
        list(arguments),
        check=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout
