"""The recipes of docker/: the start of one node, the slurm script, the Kubernetes manifest."""

import os
import shlex
import signal
import subprocess
import time
from contextlib import ExitStack

import pytest

from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD
from sparse_gpt.supervise import SECOND_REQUEST_SECONDS
from tests.launcher import Launch
from tests.multi_node.recipes import (
    after_a_failure,
    dockerfile,
    fake_slurm,
    manifest,
    pod,
    search_path,
    write_command,
)
from tests.multi_node.runs import (
    EVERY,
    SCRIPT,
    STEPS,
    curve,
    digests,
    finish,
    launch_on,
    reported,
    wait_for_step,
    write_config,
    write_report,
)
from tests.ranks import ROOT

SBATCH = "docker/slurm.sbatch"
ONE_NODE = {"NODES": "1", "NODE_RANK": "0", "SLOTS": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("script", ["docker/node.sh", SBATCH, "docker/entrypoint.sh"])
def test_shell_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


# A node.


def node(folder, deepspeed, env=ONE_NODE):
    """docker/node.sh with that script as the `deepspeed` command."""
    write_command(folder, "deepspeed", f"#!/usr/bin/env bash\n{deepspeed}\n")
    return Launch(["bash", "docker/node.sh", "script.py", "a b"], search_path(folder) | env, ROOT)


def test_a_node_starts_the_launcher_with_its_rank(tmp_path):
    slurm = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLOTS": "8", "MASTER_ADDR": "node0"}
    with node(tmp_path, 'printf "%s|" "$@"; cat "$3"; exit 7', slurm) as launch:
        result = launch.wait(30)
    assert result.returncode == 7
    hostfile = result.stdout.split("|")[2]
    expected = f"--no_ssh|--hostfile|{hostfile}|--node_rank|2|--master_addr|node0|"
    expected += "--master_port|29500|script.py|a b|"
    assert result.stdout == expected + "".join(f"node{n} slots=8\n" for n in range(3))
    assert not (ROOT / hostfile).exists()


@pytest.mark.parametrize("missing", ONE_NODE)
def test_a_node_says_what_it_must_be_told(tmp_path, missing):
    env = {key: value for key, value in ONE_NODE.items() if key != missing}
    with node(tmp_path, "exit 0", env) as launch:
        result = launch.wait(30)
    assert result.returncode != 0
    assert f"{missing}: " in result.stdout


def test_a_terminated_node_ends_its_ranks(tmp_path):
    with node(tmp_path, "sleep 300 & echo started; wait") as launch:
        launch.wait_for_output("started")
        launch.process.send_signal(signal.SIGTERM)  # to the script alone, as a container gets it
        assert launch.wait(30).returncode == EXIT_STOPPED
        assert launch.processes() == []


def saving_node(folder, seconds, **env):
    """A node whose launcher starts one rank, which is asked to stop as a real one is."""
    rank = f"RANK=0 python {ROOT}/tests/saving_rank.py {folder} {seconds}"
    return node(folder, rank, ONE_NODE | env)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_all_in_the_foreground_is_one_request(tmp_path, number):
    """As a terminal sends it; the script then passes it on to a supervisor that has it."""
    with saving_node(tmp_path, SECOND_REQUEST_SECONDS + 1) as launch:
        launch.wait_for_output("training")
        os.killpg(launch.process.pid, number)
        assert launch.wait(60).returncode == EXIT_STOPPED, launch.output
        assert launch.output.endswith("saved\n")


def test_a_second_ctrl_c_ends_a_node_at_once(tmp_path):
    with saving_node(tmp_path, 60) as launch:
        launch.wait_for_output("training")
        os.killpg(launch.process.pid, signal.SIGINT)
        time.sleep(2)
        assert launch.process.poll() is None
        os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.wait(SECOND_REQUEST_SECONDS).returncode == 128 + signal.SIGINT
        assert "saved" not in launch.output


def test_a_node_says_that_a_stop_file_ended_it(tmp_path):
    with saving_node(tmp_path, 0, RESTARTS="5") as launch:
        launch.wait_for_output("training")
        (tmp_path / "STOP").touch()
        assert launch.wait(60).returncode == EXIT_STOPPED_FOR_GOOD
        assert launch.output == "training\nsaved\n"


def test_ranks_that_outlive_the_launcher_are_ended_and_a_failure(tmp_path):
    # What `deepspeed` does when its child is killed.
    with node(tmp_path, "sleep 300 & exit 0") as launch:
        assert launch.wait(30).returncode == 1
        assert launch.processes() == []


# Slurm.


@pytest.mark.launcher
def test_a_killed_node_ends_the_slurm_job_which_resumes(network, one_node, tmp_path, corpus):
    config, env = write_config(tmp_path, corpus), fake_slurm(tmp_path, network)
    env["GLOO_SOCKET_IFNAME"] = "lo" if network.why_loopback else ""
    run = tmp_path / "run"
    with Launch(["bash", SBATCH, str(config)], env, ROOT) as launch:
        wait_for_step(launch, run, EVERY + 2)
        node_1 = os.getpgid(launch.ranks()[1].pid)  # the launcher and its rank
        assert node_1 != os.getpgid(launch.ranks()[0].pid)
        os.killpg(node_1, signal.SIGKILL)
        killed_at = time.monotonic()
        result = launch.wait(120)
        assert time.monotonic() - killed_at < 60  # 3 s on an idle machine
    # That of the killed rank, or of the other one, which gloo may abort as its peer goes.
    assert result.returncode in (128 + signal.SIGKILL, 256 - signal.SIGABRT)
    steps = max(step for kind, step in curve(run) if kind == "train")
    assert steps < STEPS, "the machine was too slow to kill it in the middle"
    assert (tmp_path / "requeued").read_text() == "4711\n"

    env["SLURM_RESTART_COUNT"] = "1"
    with Launch(["bash", SBATCH, str(config)], env, ROOT) as launch:
        (output,) = finish([launch])
    assert "resumed    step" in output
    assert curve(run) == curve(one_node)
    assert digests(run) == digests(one_node)
    assert (tmp_path / "requeued").read_text() == "4711\n"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, True),
        (1, 9, True),
        (1, 10, False),
        (2, 0, False),
        (137, 3, True),
        (EXIT_STOPPED, 0, True),
        (EXIT_STOPPED_FOR_GOOD, 0, False),
    ],
)
def test_slurm_queues_a_failure_again_but_no_users_error(
    network, tmp_path, code, restarts, requeued
):
    env = fake_slurm(tmp_path, network, f"bash -c 'exit $((SLURM_NODEID * {code}))'")
    env["SLURM_RESTART_COUNT"] = str(restarts)
    with Launch(["bash", SBATCH, "config.yaml"], env, ROOT) as launch:
        result = launch.wait(30)
    assert result.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    assert ("not queued again" in result.stdout) == (code == 1 and restarts == 10)


@pytest.mark.launcher
def test_a_stop_file_ends_the_slurm_job(network, tmp_path, corpus):
    config, env = write_config(tmp_path, corpus), fake_slurm(tmp_path, network)
    env["GLOO_SOCKET_IFNAME"] = "lo" if network.why_loopback else ""
    run = tmp_path / "run"
    with Launch(["bash", SBATCH, str(config)], env, ROOT) as launch:
        wait_for_step(launch, run, 2)
        (run / "STOP").touch()
        result = launch.wait(120)
    assert result.returncode == EXIT_STOPPED_FOR_GOOD, result.stdout
    steps = max(step for kind, step in curve(run) if kind == "train")
    assert steps < STEPS, "the machine was too slow to stop it in the middle"
    assert not (tmp_path / "requeued").exists()


def test_slurm_queues_a_job_again_before_its_time_is_over(network, tmp_path):
    done = shlex.quote(str(tmp_path / "done"))
    wait = shlex.quote(f"echo started; until test -e {done}; do sleep 0.05; done")
    env = fake_slurm(tmp_path, network, f"bash -c {wait}")
    with Launch(["bash", SBATCH, "config.yaml"], env, ROOT) as launch:
        launch.wait_for_output("started")
        launch.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while not (tmp_path / "requeued").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert launch.process.poll() is None  # until slurm ends it
        (tmp_path / "done").touch()
        assert launch.wait(30).returncode == 0
    assert (tmp_path / "requeued").read_text() == "4711\n"


# Kubernetes.


def test_the_parts_of_the_manifest_fit_together():
    documents = manifest()
    service, claim, job = (documents[kind] for kind in ("Service", "PersistentVolumeClaim", "Job"))
    spec, template = job["spec"], job["spec"]["template"]["spec"]
    (container,) = template["containers"]
    command, env = pod(container, 0, {})
    name = job["metadata"]["name"]
    selector = {"batch.kubernetes.io/job-name": name}

    assert spec["completionMode"] == "Indexed"
    assert int(env["NODES"]) == spec["completions"] == spec["parallelism"]
    assert int(env["SLOTS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert env["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert template["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == selector
    (term,) = template["affinity"]["podAntiAffinity"].popitem()[1]
    assert term["labelSelector"]["matchLabels"] == selector
    # A failed pod stays failed, so that its exit code decides.
    assert template["restartPolicy"] == "Never"
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", {}).get("containerName", "node") == container["name"]

    volumes = {volume["name"]: volume for volume in template["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    shared = volumes["shared"]["persistentVolumeClaim"]["claimName"]
    assert shared == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    work = dockerfile("WORKDIR")
    assert mounts == {f"{work}/runs": "shared", f"{work}/data": "shared", "/dev/shm": "memory"}
    files = [word for word in command if "/" in word and not word.startswith("/")]
    assert SCRIPT in files
    assert all((ROOT / file).is_file() for file in files), files


@pytest.mark.parametrize(
    ("code", "evicted", "action"),
    [
        (1, False, "Count"),  # against backoffLimit, and a new pod
        (137, False, "Count"),
        (EXIT_STOPPED, True, "Ignore"),  # a new pod
        (EXIT_STOPPED, False, "Ignore"),  # a pod whose run was stopped by an evicted one
        (137, True, "Ignore"),
        (2, False, "FailJob"),
        (EXIT_STOPPED_FOR_GOOD, False, "FailJob"),
        (EXIT_STOPPED_FOR_GOOD, True, "FailJob"),
    ],
)
def test_kubernetes_starts_new_pods_but_after_a_users_error_or_a_stop_file(code, evicted, action):
    assert after_a_failure(code, evicted) == action


def start_pods(stack, network, script, args):
    """The manifest's pods on the nodes, a rank each, with that script and arguments."""
    (container,) = manifest()["Job"]["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    container["args"] = [*words[: words.index(SCRIPT)], str(script), *args]
    _, env = pod(container, 0, {})
    changes = {"SLOTS": "1", "MASTER_ADDR": network.name(network.nodes[0], env["MASTER_ADDR"])}
    if network.why_loopback:
        changes["MASTER_PORT"] = str(network.free_port())
    pods = []
    for index, place in enumerate(network.nodes):
        command, env = pod(container, index, changes)
        pods.append(stack.enter_context(launch_on(network, place, command, env)))
    return pods


@pytest.mark.launcher
def test_the_pods_get_their_ranks_and_give_back_exit_codes(network, tmp_path):
    with ExitStack() as stack:
        pods = start_pods(stack, network, write_report(tmp_path), ["a=b"])
        for rank, (place, launch) in enumerate(zip(network.nodes, pods, strict=True)):
            result = launch.wait(120)
            assert result.returncode == 3 * rank, result.stdout
            assert reported(place, ["a=b"], rank, None) in result.stdout


@pytest.mark.slow
@pytest.mark.launcher
def test_the_pods_train_what_one_node_trains(network, one_node, tmp_path, corpus):
    with ExitStack() as stack:
        config = str(write_config(tmp_path, corpus))
        first, _ = finish(start_pods(stack, network, SCRIPT, [config]))
    assert f"step {STEPS}/{STEPS}" in first
    assert curve(tmp_path / "run") == curve(one_node)
    assert digests(tmp_path / "run") == digests(one_node)
