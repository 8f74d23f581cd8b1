"""Which token sequences are computed together, so that what they begin with is computed once.

The requests of a multiple-choice task begin alike: the answers of one question share its prompt,
the questions of an MMLU subject share five examples. A row holds one such prefix and, behind it,
the rest of several sequences, each of which sees the prefix and itself alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# A prefix is shared only where this share of the tokens is saved: rows with several sequences
# need an attention mask, which costs something.
WORTHWHILE = 0.1

Tokens = np.ndarray  # int32, one sequence


@dataclass(frozen=True)
class Row:
    """`prefix`: how many tokens the members, indices of sequences, share at their beginning.

    `length`: tokens of the prefix and of every member's rest. A row of one member is a plain
    sequence, with prefix 0.
    """

    prefix: int
    members: tuple[int, ...]
    length: int


@dataclass
class _Node:
    """An interval of the sorted sequences that begin with the same `prefix` tokens."""

    prefix: int
    first: int
    cost: float = 0.0
    own: int = 1 << 60  # fewest tokens that any sequence may give to a prefix
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # prefix, first, end

    def add(self, child: "_Node") -> None:
        self.cost += child.cost
        self.own = min(self.own, child.own)
        self.groups += child.groups


def plan_rows(sequences: Sequence[Tokens], shareable: Sequence[int], limit: int) -> list[Row]:
    """Rows that together hold every sequence once, longest first.

    shareable: how many leading tokens of each sequence may lie in a prefix (the others are
    scored, or give scores). limit: tokens of a row that holds several sequences. Groups are
    chosen to compute the fewest tokens, over the tree of common beginnings.
    """
    if not sequences:
        return []
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i4").tobytes())
    lengths = np.array([len(sequences[i]) for i in order])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    rows: list[Row] = []
    for prefix, first, end in _groups(sequences, shareable, order, ends, limit):
        rows += _pack(order[first:end], sequences, prefix, limit)
    return sorted(rows, key=lambda row: (-row.length, row.members))


def _groups(
    sequences: Sequence[Tokens],
    shareable: Sequence[int],
    order: list[int],
    ends: np.ndarray,
    limit: int,
) -> list[tuple[int, int, int]]:
    """(prefix, first, end) of groups of `order`, bottom-up over its intervals of equal prefixes."""

    def close(node: _Node, end: int) -> _Node:
        prefix = min(node.prefix, node.own)
        count = end - node.first
        if prefix < 1 or prefix >= limit:
            return node
        rests = int(ends[end] - ends[node.first]) - count * prefix
        shared = -(-rests // (limit - prefix)) * prefix + rests
        if shared <= (1 - WORTHWHILE) * node.cost:
            node.cost, node.groups = shared, [(prefix, node.first, end)]
        return node

    stack = [_Node(0, 0)]
    for place, index in enumerate(order):
        length = len(sequences[index])
        child = _Node(length, place, length, shareable[index], [(0, place, place + 1)])
        common = 0
        if place + 1 < len(order):
            common = common_prefix(sequences[index], sequences[order[place + 1]])
        while stack[-1].prefix > common:
            node = stack.pop()
            node.add(child)
            child = close(node, place + 1)
        if stack[-1].prefix < common:
            stack.append(_Node(common, child.first))
        stack[-1].add(child)
    return stack[0].groups


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _pack(members: list[int], sequences: Sequence[Tokens], prefix: int, limit: int) -> list[Row]:
    """Rows of a group, longest members first, each filled before the next is begun."""
    filled: list[tuple[list[int], int]] = []
    for index in sorted(members, key=lambda index: (-len(sequences[index]), index)):
        rest = len(sequences[index]) - prefix
        if not filled or not prefix or filled[-1][1] + rest > limit:
            filled.append(([], prefix))
        row, length = filled[-1]
        filled[-1] = ([*row, index], length + rest)
    return [Row(prefix if len(row) > 1 else 0, tuple(row), length) for row, length in filled]


def batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows that are computed at once: at most `budget` tokens with padding, or a single row.

    Rows of one sequence and rows of several are kept apart: only these need a mask.
    """
    made: list[list[Row]] = []
    for plain in (True, False):
        batch: list[Row] = []
        for row in rows:
            if (len(row.members) == 1) != plain:
                continue
            if batch and (len(batch) + 1) * batch[0].length > budget:
                made.append(batch)
                batch = []
            batch.append(row)
        if batch:
            made.append(batch)
    return made
