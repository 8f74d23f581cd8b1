"""The real command, once on each of two nodes, without ssh."""

import time

import pytest

from tests.launcher import run_deepspeed
from tests.multi_node.runs import (
    EVERY,
    SCRIPT,
    STEPS,
    curve,
    digests,
    finish,
    launched,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.launcher

PARAMETERS = 118_592  # of the model of `write_config`


def test_two_nodes_train_what_one_node_trains(network, one_node, tmp_path, corpus):
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    before = [node.received_bytes() for node in network.nodes]
    with launched(network, [config]) as nodes:
        first, second = finish(nodes)
    received = [node.received_bytes() - b for node, b in zip(network.nodes, before, strict=True)]

    assert sum(kind == "topology" for kind, _ in curve(run)) >= 2
    assert curve(run) == curve(one_node)
    assert digests(run) == digests(one_node)
    # A step brings each node at least the other's fp32 gradients of the half that it owns, and
    # the new weights of the half that it does not.
    assert min(received) > STEPS * PARAMETERS * 4
    # Rank 0, on node 0, speaks for the run.
    assert f"step {STEPS}/{STEPS}" in first
    assert f"step {STEPS}/{STEPS}" not in second


@pytest.mark.slow  # test_recipes.py kills node 1 of a slurm job
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_node_ends_the_other_and_the_run_resumes(
    network, one_node, tmp_path, corpus, killed
):
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    with launched(network, [config]) as nodes:
        wait_for_step(nodes[0], run, EVERY + 2)
        nodes[killed].kill_all()
        killed_at = time.monotonic()
        result = nodes[1 - killed].wait(120)
        assert result.returncode not in (0, 2), result.stdout
        assert time.monotonic() - killed_at < 60  # 3 s on an idle machine
        assert nodes[1 - killed].processes() == []
    steps = max(step for kind, step in curve(run) if kind == "train")
    assert steps < STEPS, "the machine was too slow to kill it in the middle"

    with launched(network, [config]) as nodes:
        first, _ = finish(nodes)
    assert "resumed    step" in first
    assert curve(run) == curve(one_node)
    assert digests(run) == digests(one_node)


@pytest.mark.slow
def test_two_ranks_a_node_at_stage_3(network, tmp_path, corpus):
    changes = {"deepspeed": {"zero_stage": 3, "param_persistence_threshold": 500}}
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, corpus, **changes)
        runs.append(tmp_path / name / "run")
        if name == "one":
            result = run_deepspeed(SCRIPT, [config], 4)
            assert result.returncode == 0, result.stdout
        else:
            with launched(network, [config], slots=2) as nodes:
                finish(nodes)
    assert curve(runs[1]) == curve(runs[0])
    assert digests(runs[1]) == digests(runs[0])
