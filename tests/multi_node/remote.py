"""`ssh` between the nodes of a test, and `pdsh` where it is not installed.

The stand-in for ssh does what sshd does: the words of a command are joined and given to a shell on
the named node, which starts in the home folder with next to no environment.
"""

import shlex
import shutil
import sys
from pathlib import Path

from tests.launcher import MARK
from tests.leftovers import MARK as SESSION_MARK
from tests.multi_node.network import Network
from tests.multi_node.recipes import search_path, write_command

SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in
        -[oplF]) shift 2 ;; # options with a value
        *) shift ;;
    esac
done
host=$1
shift
case $host in
{cases}
    *) echo "ssh: Could not resolve hostname $host" >&2; exit 255 ;;
esac
# The marks are how the tests find what they started.
exec env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin SHELL=/bin/bash \\
    {mark}="${mark}" {session}="${session}" "${{enter[@]}}" bash -c "cd; $*"
"""
PDSH = """#!{python}
import subprocess, sys, threading

words, hosts, largest = sys.argv[1:], [], False
while words[0].startswith("-"):
    option = words.pop(0)
    if option == "-S":
        largest = True
    elif option == "-w":
        hosts = words.pop(0).split(",")
    elif option == "-f":
        words.pop(0)
    else:
        sys.exit(f"pdsh: this stand-in does not know {{option}}")
command, codes = " ".join(words), []

def run(rank, host):
    text = command.replace("%n", str(rank)).replace("%h", host)
    ssh = ["ssh", "-2", "-a", "-x", "-lroot", host, text]
    process = subprocess.Popen(ssh, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(f"{{host}}: {{line}}", end="", flush=True)
    codes.append(process.wait())

threads = [threading.Thread(target=run, args=pair) for pair in enumerate(hosts)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(max(codes) if largest else 0)
"""


def ssh_environment(folder: Path, network: Network) -> dict[str, str]:
    """The environment in which `deepspeed --hostfile` reaches the nodes; HOME is in `folder`."""
    cases = [
        f"    {node.name}) enter=({shlex.join(node.command([], Path('/'), from_node=True))}) ;;"
        for node in network.nodes
    ]
    script = SSH.format(cases="\n".join(cases), mark=MARK, session=SESSION_MARK)
    write_command(folder / "bin", "ssh", script)
    if shutil.which("pdsh") is None:
        write_command(folder / "bin", "pdsh", PDSH.format(python=sys.executable))
    (folder / "home").mkdir()
    return search_path(folder / "bin") | {"HOME": str(folder / "home")}
