"""Disks that are full, read-only or gone, at every operation of a save: said on all ranks."""

import pytest

from tests.faults import tally
from tests.faults.kills import losses
from tests.faults.operations import WRITING
from tests.faults.refusals import every_place, log_on_a_full_disk, short_of_a_rank, vanishing
from tests.ranks import run_ranks

ALL = (*WRITING, "rename", "exchange", "unlink", "rmdir")


@pytest.mark.parametrize(
    ("what", "kinds", "step", "exchange"),
    [
        ("full", WRITING, 3, True),
        pytest.param("read-only", ALL, 3, True, marks=pytest.mark.slow),
        pytest.param("forbidden", ALL, 3, True, marks=pytest.mark.slow),
        ("broken", ("fsync",), 3, True),
        ("broken", ("fsync", "exchange"), 2, True),
        ("broken", ("fsync", "rename"), 2, False),
        pytest.param("full", ALL, 2, True, marks=pytest.mark.slow),
        pytest.param("broken", ALL, 2, True, marks=pytest.mark.slow),
        pytest.param("broken", ALL, 2, False, marks=pytest.mark.slow),
    ],
)
def test_every_operation_refused(corpus, tmp_path, what, kinds, step, exchange):
    """The previous checkpoints stay, no rank waits, and with room again the save is made.

    A save of step 3 adds one, of step 2 replaces one. What was said is what is there.
    """
    run = str(tmp_path / "run")
    first, second = run_ranks(2, every_place, corpus, run, what, kinds, step, exchange)
    assert first == second
    assert first[0] > first[1] > 0
    tally.add(f"operations of a save refused ({what} disk)", sum(first.values()))


@pytest.mark.parametrize("line", [1, 3, 5])
def test_a_log_that_cannot_be_written_ends_the_run_at_its_next_save(corpus, tmp_path, line):
    """Nothing of it is lost then: the run that goes on logs every step once."""
    run, never = tmp_path / "run", 10**9
    results = run_ranks(2, log_on_a_full_disk, corpus, str(run), line)
    for problem, _ in results:
        assert f"{run}/metrics.jsonl" in problem and "No space left" in problem
    assert sum("warning" in text and "metrics.jsonl" in text for text in results[0][1]) == 1
    results = run_ranks(2, log_on_a_full_disk, corpus, str(run), never)
    assert [problem for problem, _ in results] == ["", ""]
    assert list(losses(run)) == list(range(1, 7))
    assert any("TensorBoard gets no more points" in text for text in results[0][1])


@pytest.mark.parametrize("place", ["between saves", "while writing", "before publishing"])
def test_a_folder_that_is_gone_is_not_made_anew(corpus, tmp_path, place):
    folder = tmp_path / "run/checkpoints"
    for said in run_ranks(2, vanishing, corpus, str(tmp_path / "run"), place):
        assert str(folder) in said
        assert "gone" in said or "No such file" in said
    tally.add("folders that vanished in a run")


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_file_that_did_not_arrive_is_seen_before_anything_is_published(corpus, tmp_path, how):
    for said in run_ranks(2, short_of_a_rank, corpus, str(tmp_path / "run"), how):
        assert "step 3 was not saved" in said
        assert "exp_avg-00001.safetensors" in said
