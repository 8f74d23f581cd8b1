"""What a selection sends, and what it refuses."""

import pytest
import torch

from sparse_gpt.topology import select
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.topology.select import select_top
from tests.topology.exchange import Rank, on_ranks, outcomes
from tests.topology.selections import KINDS, Layer, check, choose, count, many_layers, tuned


@pytest.mark.parametrize("kind", KINDS)
def test_few_exchanges_whatever_the_number_and_size_of_layers(kind):
    """A sample, and one or two rounds where it proposes well, as on weights it does."""
    for number, numel in ((1, 300_000), (30, 30_000)):
        made = many_layers(numel, 2, number)
        counts = [count([layer]) * 3 // 10 for layer in made]
        apart = choose(kind, [[layer] for layer in made], counts)
        assert len(apart.sent) <= 5, apart.sent
        one = choose(kind, [made], [sum(counts)])
        assert len(one.sent) <= 5, one.sent
        rounds = apart.sent if kind == "random" else apart.sent[1:]
        assert all(size % (4 * (2 + select.BINS)) == 0 for size in rounds)
        assert max(rounds) <= number * 4 * (2 + select.BINS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole_model", [False, True])
def test_what_is_sent_does_not_grow_with_layers(kind, whole_model):
    """Rounds narrow by the number of bins each, so sizes tell in their number only, by a log."""
    sent = []
    for numel in (2_000, 200_000):
        made = many_layers(numel, 3, 2)
        groups = [made] if whole_model else [[layer] for layer in made]
        with tuned(bins=64, sample=256):
            sent.append(choose(kind, groups, [count(g) // 2 for g in groups]).sent)
    small, large = sent
    assert set(large) <= set(small) | {4 * 66}
    assert len(large) <= len(small) + 3


def test_the_worst_case_is_bounded():
    """Equal keys throughout, a sample that says nothing: bits of keys and positions by 11."""
    numel = 20_000
    generator = torch.Generator().manual_seed(0)
    for values in (torch.ones(numel), torch.zeros(numel), torch.randn(numel, generator=generator)):
        layer = Layer(values, torch.ones(numel, dtype=torch.bool), [(0, 777), (777, numel)])
        for kind in ("largest", "smallest"):
            with tuned(sample=1, sigmas=0.0):
                outcome = check(kind, [[layer]], [numel // 3])
            # sample, miss, 3 rounds for keys, 2 for positions
            assert len(outcome.sent) <= 7


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_sent_where_nothing_is_to_be_found_out(kind):
    made = many_layers(1000, 2, 2)
    groups = [[layer] for layer in made]
    assert check(kind, groups, [0, count(groups[1])]).sent == []


def test_a_group_without_candidates():
    layer = Layer(torch.rand(20), torch.zeros(20, dtype=torch.bool), [(0, 9), (9, 20)])
    other = many_layers(50, 2, 1)[0]
    for kind in KINDS:
        assert check(kind, [[layer], [other]], [0, 3]).chosen[0] == [set()]


def test_no_groups():
    assert select_top([], [], [], lambda values: values) == []


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["largest", "smallest"])
@pytest.mark.parametrize("candidate", [True, False])
def test_a_score_that_is_not_finite_on_one_rank_is_refused_on_every_rank(bad, kind, candidate):
    """Candidate or not: a broken weight or gradient is a broken update."""
    for place in (0, 24, 25, 49):
        layer, other = many_layers(50, 2, 2)
        layer.values[place], layer.candidates[place] = bad, candidate
        for groups in ([[layer], [other]], [[other, layer]]):
            counts = [count(group) // 2 for group in groups]

            def body(rank: Rank, groups=groups, counts=counts):
                sources = [[la.source(kind, rank.index, 0) for la in group] for group in groups]
                select_top(sources, counts, [count(group) for group in groups], rank.sum)

            with tuned(chunk=8):
                errors = [error for _, error in outcomes(2, body)]
            assert [type(error) for error in errors] == [NonFiniteScores] * 2
            assert all("not finite" in str(error) for error in errors)


def test_random_choice_reads_no_values():
    layer = many_layers(50, 2, 1)[0]
    layer.values[:] = float("nan")
    check("random", [[layer]], [5])


@pytest.mark.parametrize("wrong", [-1, 11])
def test_a_count_that_cannot_be_is_refused_before_anything_is_sent(wrong):
    flags = torch.arange(30) < 10
    layer = Layer(torch.rand(30), flags, [(0, 13), (13, 30)])

    def body(rank: Rank):
        sources = [[layer.source("largest", rank.index, 0)]] * 2
        with pytest.raises(ValueError, match=f"cannot choose {wrong} of 10 candidates"):
            select_top(sources, [5, wrong], [10, 10], rank.sum)
        return rank.sent

    assert on_ranks(2, body) == [[], []]


def test_what_is_given_is_left_alone():
    layer = many_layers(300, 1, 1)[0]
    before, source = layer.values.clone(), layer.source("smallest", 0, 0)
    members = source.candidates.data.clone()
    select_top([[source]], [20], [count([layer])], lambda values: values)
    select_top([[source]], [count([layer])], [count([layer])], lambda values: values)
    assert torch.equal(layer.values, before)
    assert torch.equal(source.candidates.data, members)


@pytest.mark.parametrize("chosen", ["none", "all"])
def test_none_or_all_are_chosen_without_a_look_at_the_scores(chosen):
    layer = many_layers(50, 1, 1)[0]
    layer.values[7] = float("nan")
    k = count([layer]) if chosen == "all" else 0
    outcome = choose("largest", [[layer]], [k])
    assert len(outcome.chosen[0][0]) == k
    assert outcome.sent == []
