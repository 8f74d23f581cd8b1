"""The threads that stand for ranks: right sums, and no failure that hangs or hides."""

import threading
import time

import pytest
import torch

from tests.topology.exchange import Deserted, on_ranks, outcomes


def test_sums_and_maxima_in_turn():
    def body(rank):
        given = torch.tensor([rank.index, -rank.index], dtype=torch.int32)
        total = rank.sum(given)
        assert given.tolist() == [77, 77], "what was given is spoilt"
        largest = rank.max(torch.tensor([rank.index]))
        return total.tolist(), total.dtype, largest.tolist(), rank.sent

    assert on_ranks(4, body) == [([6, -6], torch.int32, [3], [8, 8])] * 4


def test_a_rank_that_raises_fails_the_others_at_once():
    def body(rank):
        rank.sum(torch.zeros(1))
        if rank.index == 1:
            raise ValueError("rank 1 has had enough")
        rank.sum(torch.zeros(1))

    before = time.monotonic()
    errors = [type(error) for _, error in outcomes(3, body, seconds=60)]
    assert errors == [Deserted, ValueError, Deserted]
    with pytest.raises(ValueError, match="had enough"):
        on_ranks(3, body, seconds=60)
    assert time.monotonic() - before < 30


def test_all_may_raise_after_the_same_exchange():
    def body(rank):
        if int(rank.sum(torch.ones(1, dtype=torch.int64))) == 5:
            raise ValueError("all of us")

    for _ in range(50):
        assert {type(error) for _, error in outcomes(5, body)} == {ValueError}


def test_ranks_in_different_collectives():
    def body(rank):
        return rank.sum(torch.zeros(1 + rank.index))

    with pytest.raises(RuntimeError, match="different collectives"):
        on_ranks(2, body)


def test_ranks_that_never_come_to_an_end():
    def body(rank):
        while True:
            rank.sum(torch.zeros(1))

    with pytest.raises(RuntimeError, match="has made 200 exchanges"):
        on_ranks(2, body)


def test_a_rank_that_hangs_times_out():
    release = threading.Event()

    def body(rank):
        if rank.index == 0:
            release.wait(20)
        rank.sum(torch.zeros(1))

    (_, hung), (_, waited) = outcomes(2, body, seconds=0.2)
    release.set()
    assert isinstance(hung, Deserted) and str(hung) == "did not end"
    assert isinstance(waited, Deserted) and "only [1] came" in str(waited)
