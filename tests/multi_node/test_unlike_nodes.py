"""Nodes that do not see the same files: every rank ends at once, and the first line says why."""

import time
from contextlib import contextmanager

import pytest

from sparse_gpt.errors import TryAgain, UserError
from tests.contracts.runs import run_config
from tests.multi_node.runs import launched, write_config
from tests.ranks import run_ranks


def failing_on_rank_1(same):
    import torch.distributed as dist

    from sparse_gpt.train.every_rank import on_every_rank

    def action():
        if same:
            raise UserError("this")
        if dist.get_rank() == 1:
            raise OSError("the disk")

    try:
        on_every_rank(action, "place")
    except UserError as error:
        return str(error)
    return ""


def test_what_one_rank_meets_all_of_them_raise():
    first, second = run_ranks(2, failing_on_rank_1, False)
    assert first == second
    assert first.startswith("place: the disk (rank 1 on ")
    assert first.endswith("; 1 of 2 ranks)")


def test_what_all_ranks_meet_is_said_as_it_is():
    assert run_ranks(2, failing_on_rank_1, True) == ["this", "this"]


def raising_by_rank(kinds):
    import torch.distributed as dist

    from sparse_gpt.train.every_rank import on_every_rank

    def action():
        if (kind := kinds[dist.get_rank()]) is not None:
            raise kind("this")

    try:
        on_every_rank(action, "place")
    except UserError as error:
        return error.code
    return 0


@pytest.mark.parametrize(
    ("kinds", "code"), [((None, TryAgain), 1), ((TryAgain, UserError), 2), ((None, None), 0)]
)
def test_the_code_of_what_ranks_meet(kinds, code):
    """The same start is of use where nothing else is wrong anywhere."""
    assert run_ranks(2, raising_by_rank, kinds) == [code, code]


def seeing_another_folder(corpus, folders):
    import torch.distributed as dist

    from sparse_gpt.train import every_rank

    every_rank.LOOK_SECONDS = 0.2
    try:
        every_rank.check_nodes(run_config(corpus, folders[dist.get_rank()]))
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_write_to_folders_of_the_same_name(corpus, tmp_path):
    folders = [str(tmp_path / name) for name in ("here", "there")]
    first, second = run_ranks(2, seeing_another_folder, str(corpus), folders)
    assert first == second
    assert first.startswith(f"output_dir: {folders[1]} is not the folder that rank 0 writes to")
    assert "(rank 1 on " in first
    assert run_ranks(2, seeing_another_folder, str(corpus), [folders[0]] * 2) == ["", ""]
    assert not list(tmp_path.glob("*/*"))


@contextmanager
def hidden_from_node_1(network, folder):
    if network.why_loopback:
        pytest.skip(network.why_loopback)
    _, second = network.nodes
    second.run("mount", "-t", "tmpfs", "none", str(folder))
    try:
        yield
    finally:
        second.run("umount", str(folder))


@pytest.mark.launcher
@pytest.mark.parametrize("what", [pytest.param("output_dir", marks=pytest.mark.slow), "data"])
def test_a_folder_that_one_node_does_not_share(network, corpus, tmp_path, what):
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    run.mkdir()
    place = run if what == "output_dir" else corpus
    with hidden_from_node_1(network, place), launched(network, [config]) as nodes:
        first = nodes[0].wait(120)
        ended = time.monotonic()
        second = nodes[1].wait(120)
        assert time.monotonic() - ended < 60  # else it waits for a rank that has gone
    assert first.returncode == second.returncode == 2, first.stdout + second.stdout
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("error: ")]
    assert str(place) in line
    assert "(rank 1 on node1; 1 of 2 ranks)" in line
    assert list(run.iterdir()) == []
