"""The best units of many groups at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.topology import groups
from sparse_gpt.topology.groups import best_in_groups


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_as_python_sorts(data):
    number, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    cells = number * width
    keys = data.draw(st.lists(st.integers(0, 3), min_size=cells, max_size=cells))
    free = data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    rows = [range(g * width, (g + 1) * width) for g in range(number)]
    counts = [data.draw(st.integers(0, sum(free[i] for i in row))) for row in rows]
    chosen = best_in_groups(
        torch.tensor(keys).view(number, width),
        torch.tensor(free).view(number, width),
        torch.tensor(counts),
    )
    for row, count, flags in zip(rows, counts, chosen.tolist(), strict=True):
        order = sorted((i for i in row if free[i]), key=lambda i: (-keys[i], i))
        assert {i for i, flag in zip(row, flags, strict=True) if flag} == set(order[:count])


def test_group_by_group_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(0, 5, (37, 8), generator=generator)
    free = torch.rand(37, 8, generator=generator) < 0.7
    counts = free.sum(1) // 2
    together = best_in_groups(keys, free, counts)
    monkeypatch.setattr(groups, "chunk_size", lambda device: 5 * 8)
    assert torch.equal(best_in_groups(keys, free, counts), together)


@pytest.mark.parametrize("counts", [[1, 3], [-1, 1]])
def test_more_than_a_group_has_is_refused(counts):
    free = torch.tensor([[True, True, False], [True, False, True]])
    with pytest.raises(ValueError, match="a group cannot give"):
        best_in_groups(torch.ones(2, 3, dtype=torch.int64), free, torch.tensor(counts))


def test_ties_of_wide_groups_go_to_the_lower_index():
    keys = torch.arange(2000).view(2, 1000) % 2
    chosen = best_in_groups(keys, torch.ones(2, 1000, dtype=torch.bool), torch.tensor([300, 600]))
    wanted = [[*range(1, 600, 2)], sorted([*range(1, 1000, 2), *range(0, 200, 2)])]
    assert [row.nonzero().view(-1).tolist() for row in chosen] == wanted
