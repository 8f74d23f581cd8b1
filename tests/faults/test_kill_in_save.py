"""kill -9 in a save, on any rank, at any operation on a file or any time: nothing is lost."""

import pytest

from tests.faults import tally
from tests.faults.kills import RANKS, killed_saves, undisturbed
from tests.faults.kills_of_replacing import HOW, anywhere, at_publishing
from tests.ranks import run_ranks

FEW, MANY, SEED = 40, 220, 20


def kill(corpus, tmp_path, seed, kills):
    steps = kills * 2 + 20  # fewer than that many saves get through, also on a quick machine
    whole, losses = run_ranks(RANKS, undisturbed, corpus, str(tmp_path / "whole"), steps)[0]
    run = str(tmp_path / "run")
    seen = run_ranks(RANKS, killed_saves, corpus, run, seed, kills, whole, timeout_seconds=1200)[0]
    tally.add("kills in a save, each followed by a resumed run", seen["kills"])
    tally.note(
        f"kills of seed {seed}: {seen['kills']} in {seen['kills'] + seen['saved']} saves, "
        f"{seen['new']} left the new checkpoint, {seen['old']} the previous one; went on to step "
        f"{seen['last']} with the losses and files of the undisturbed run"
    )
    assert seen["kills"] >= kills
    assert seen["new"] and seen["old"]
    assert seen["losses"] == {step: losses[step] for step in range(1, seen["last"] + 1)}


def test_some_kills(corpus, tmp_path):
    kill(corpus, tmp_path, SEED, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [SEED + 1])
def test_many_kills(corpus, tmp_path, seed):
    kill(corpus, tmp_path, seed, MANY)


def replaced(how, results):
    seen = results[0]
    assert all(other == seen for other in results)
    assert seen["old"] and seen["new"]
    tally.add(f"kills in a save that replaces a checkpoint ({how})", seen["kills"])


@pytest.mark.parametrize("how", HOW)
def test_kills_where_a_checkpoint_takes_the_place_of_another(corpus, tmp_path, how):
    replaced(how, run_ranks(RANKS, at_publishing, corpus, str(tmp_path / "run"), how))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_many_kills_of_saves_that_replace_a_checkpoint(corpus, tmp_path, how):
    run = str(tmp_path / "run")
    replaced(how, run_ranks(RANKS, anywhere, corpus, run, how, SEED, MANY // 2))
