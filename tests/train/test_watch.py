"""Ranks that die, fail, hang or are frozen: the others end within seconds and say which."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from sparse_gpt.config import TimeoutsConfig
from sparse_gpt.errors import TryAgain, UserError
from tests.ranks import ROOT, RankError, run_ranks
from tests.tiny import write_corpus

HOST = socket.gethostname()
STEP = 3


def stay_here():
    while True:
        time.sleep(0.1)


@contextmanager
def end_of_a_user_error():
    """As an entry point has it: one line, and the code."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(error.code)


def work(faulty, fault, timeouts):
    """Steps with an exchange each, of which a rank does not make the third.

    `fault`: "start" is a kill before the first, "refuse" or "again" an error of its own in the
    third.
    """
    import torch
    import torch.distributed as dist

    from sparse_gpt.train import watch

    watch.BEAT_SECONDS, watch.GRACE_SECONDS = 0.2, 0.5
    if fault == "on another node":
        watch._peers, fault = (lambda nodes, rank: {}), signal.SIGKILL
    with end_of_a_user_error(), watch.Watch(TimeoutsConfig(**timeouts)) as watching:
        if fault == "start":
            dist.barrier()  # both are in
            if dist.get_rank() == faulty:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1))
        for step in range(1, STEP + 2):
            watching.step = step
            if fault == "hang between" and dist.get_rank() == faulty:
                watching.rest()
            else:
                watching.mark()
            if step == STEP:
                time.sleep(0.5)  # until the step is known
                if dist.get_rank() == faulty:
                    if fault in ("hang", "hang between"):
                        stay_here()
                    elif fault == "fail":
                        raise ZeroDivisionError("a fault")
                    elif fault in ("refuse", "again"):
                        raise {"refuse": UserError, "again": TryAgain}[fault]("token 70000 is none")
                    os.kill(os.getpid(), fault)
            dist.all_reduce(torch.ones(1))
            if step == STEP + 1:
                time.sleep(0.5 * dist.get_rank())  # the ranks do not leave together
    return sorted(thread.name for thread in threading.enumerate())


def lost(monkeypatch, world_size, faulty, fault, **timeouts):
    began = time.monotonic()
    if fault != signal.SIGSTOP:  # a frozen rank never answers
        monkeypatch.setattr("tests.ranks.GRACE_SECONDS", 20.0)
    with pytest.raises(RankError) as caught:
        run_ranks(world_size, work, faulty, fault, timeouts)
    assert time.monotonic() - began < 60
    return str(caught.value)


def test_ranks_that_all_go_on_are_not_disturbed():
    for names in run_ranks(2, work, None, None, {}) + run_ranks(1, work, None, None, {}):
        assert not any(name.startswith("watch-") for name in names)


def leave_one_by_one(late, timeouts):
    import torch.distributed as dist

    from sparse_gpt.train import watch

    watch.BEAT_SECONDS, watch.GRACE_SECONDS = 0.2, 0.5
    with watch.Watch(TimeoutsConfig(**timeouts)):
        if dist.get_rank() == late:
            time.sleep(6.0)
    return "left"


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_leaves_last_takes_nobody_for_lost(late):
    """Such as the first one, which alone closes the log, by a network."""
    timeouts = {"silence": 2.0, "progress": 1.0}
    assert run_ranks(2, leave_one_by_one, late, timeouts) == ["left"] * 2


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_killed_rank_is_named(monkeypatch, faulty):
    said = lost(monkeypatch, 2, faulty, signal.SIGKILL)
    assert f"LostRank: rank {faulty} on {HOST} has ended" in said
    assert "the last step was " in said


def test_a_rank_killed_on_another_node_is_named(monkeypatch):
    said = lost(monkeypatch, 2, 1, "on another node")
    assert "LostRank: an exchange failed, and there is no sign of life of rank 1 on" in said


def test_a_rank_that_fails_is_named_with_its_error(monkeypatch):
    said = lost(monkeypatch, 2, 1, "fail")
    assert f": rank 1 on {HOST} failed in step 3: ZeroDivisionError: a fault" in said


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_killed_before_its_first_step_is_named(monkeypatch, faulty):
    said = lost(monkeypatch, 2, faulty, "start")
    assert f"LostRank: rank {faulty} on {HOST} has ended, before its first step" in said


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize(("fault", "code"), [("refuse", 2), ("again", 1)])
def test_a_user_error_of_one_rank_ends_all_with_its_text_and_code(monkeypatch, faulty, fault, code):
    """Of rank 0, too, whose store goes with it; the others have no traceback."""
    said = lost(monkeypatch, 3, faulty, fault)
    assert said.count(f"died with exit status {code}") == 3 and "Traceback" not in said
    assert said.count("\nerror: token 70000 is none") == 1
    text = f"\nerror: rank {faulty} on {HOST} failed in step 3: token 70000 is none"
    assert said.count(text) == 2


@pytest.mark.parametrize("fault", ["hang", "hang between"])  # in a step, or between two
def test_a_rank_that_hangs_is_named_with_the_place(monkeypatch, fault):
    said = lost(monkeypatch, 3, 1, fault, progress=2.0)
    assert "step 3 has made no headway for 2 s (timeouts.progress): " in said
    assert f"rank 1 on {HOST} is in {__file__}:" in said
    assert "stay_here; 2 others wait in an exchange" in said


def test_a_rank_alone_that_hangs_says_where(monkeypatch):
    said = lost(monkeypatch, 1, 0, "hang", progress=2.0)
    assert (
        f"error: step 3 has made no headway for 2 s (timeouts.progress): rank 0 on {HOST}" in said
    )
    assert "stay_here" in said and "others" not in said


ALONE = """
import sys, time
import torch.distributed as dist
from sparse_gpt.config import TimeoutsConfig
from sparse_gpt.train import watch
watch.BEAT_SECONDS, watch.GRACE_SECONDS = 0.2, 0.5
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
with watch.Watch(TimeoutsConfig(progress=4.0)) as watching:
    watching.mark()
    print("ready", flush=True)
    time.sleep(1.5)
    watching.mark()
"""


def test_a_run_that_was_suspended_is_not_taken_for_one_that_hangs():
    command = [sys.executable, "-c", ALONE]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


def busy_while_the_others_wait(progress):
    import torch
    import torch.distributed as dist

    from sparse_gpt.train import watch

    watch.BEAT_SECONDS, watch.GRACE_SECONDS = 0.2, 0.5
    with watch.Watch(TimeoutsConfig(progress=progress)) as watching:
        watching.mark()
        until = time.monotonic() + progress + 7
        while dist.get_rank() == 1 and time.monotonic() < until:
            watching.mark()
            time.sleep(0.1)
        dist.all_reduce(torch.ones(1))


def test_ranks_that_wait_for_one_that_makes_headway_go_on_waiting():
    run_ranks(2, busy_while_the_others_wait, 1.0)


def hang_in(place, corpus, out):
    """A run whose rank 1 hangs in the last save, or in the evaluation after the last step."""
    import torch.distributed as dist

    from sparse_gpt.train import checkpoint_files, results, watch
    from tests.contracts.runs import run_config, trainer

    watch.BEAT_SECONDS, watch.GRACE_SECONDS = 0.2, 0.5
    owner, name = {
        "save": (checkpoint_files, "write_tensors"),
        "evaluation": (results, "describe"),
    }[place]
    inner = getattr(owner, name)

    def meet(*arguments):
        if dist.get_rank() == 1:
            stay_here()
        return inner(*arguments)

    config = run_config(corpus, out, max_steps=4, timeouts__progress=5.0)
    with trainer(config) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, meet)
        with made.watch:
            made.fit()
            results.final_results(made)


@pytest.mark.parametrize("place", ["save", "evaluation"])
def test_a_rank_that_hangs_after_the_last_step_is_named(monkeypatch, tmp_path, place):
    monkeypatch.setattr("tests.ranks.GRACE_SECONDS", 20.0)
    corpus = write_corpus(tmp_path / "tiny", documents=40, val_documents=2)
    with pytest.raises(RankError) as caught:
        run_ranks(2, hang_in, place, str(corpus), str(tmp_path / "run"))
    said = str(caught.value)
    assert f"has made no headway for 5 s (timeouts.progress): rank 1 on {HOST} is in" in said
    assert "stay_here; 1 others wait in an exchange" in said


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_frozen_rank_is_named(monkeypatch, faulty):
    said = lost(monkeypatch, 2, faulty, signal.SIGSTOP, silence=2.0)
    what = "has not answered for 2 s" if faulty == 0 else "has given no sign of life for 2 s"
    assert f"error: rank {faulty} on {HOST} {what}" in said


def test_timeouts_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="progress 30 must be shorter than exchange 20"):
        TimeoutsConfig(exchange=20, progress=30)


def reading():
    import torch.distributed as dist

    from sparse_gpt.train.every_rank import read_first

    def read():
        if dist.get_rank() == 1:
            raise FileNotFoundError(2, "No such file", "c.yaml")
        return 7

    found = read_first(read)
    try:
        return found.on_every_rank("config")
    except UserError as error:
        return str(error)


def test_a_configuration_that_one_rank_cannot_read_is_an_error_on_all():
    first, second = run_ranks(2, reading)
    assert first == second
    assert "c.yaml" in first and f"(rank 1 on {HOST}; 1 of 2 ranks)" in first


def test_without_a_launcher_it_is_raised_at_once(monkeypatch):
    from sparse_gpt.train.every_rank import read_first

    def fail():
        raise UserError("bad key")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="bad key"):
        read_first(fail)
