"""Packed sets of positions, against Python's own sets."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_gpt.topology import bits as module
from sparse_gpt.topology.bits import Bits, chunks, pack, unpack

FLAGS = st.lists(st.booleans(), max_size=70)


def bits_of(flags: list[bool]) -> Bits:
    return Bits.of(torch.tensor(flags, dtype=torch.bool))


def members(bits: Bits) -> set[int]:
    """Read from the bytes by hand; the bits behind the last position must be zero."""
    data = bits.data.tolist()
    assert bits.data.dtype == torch.uint8 and len(data) == -(-bits.numel // 8)
    found = {8 * i + j for i, byte in enumerate(data) for j in range(8) if byte >> (7 - j) & 1}
    assert all(position < bits.numel for position in found)
    return found


@given(FLAGS)
def test_every_way_to_read_a_set(flags):
    bits = bits_of(flags)
    wanted = [i for i, flag in enumerate(flags) if flag]
    assert bits.numel == len(flags)
    assert members(bits) == set(wanted)
    assert bits.data.tolist() == np.packbits(np.array(flags, dtype=bool)).tolist()
    assert bits.flags().tolist() == [int(flag) for flag in flags]
    assert bits.flags().dtype == torch.uint8
    assert bits.positions().tolist() == wanted and bits.positions().dtype == torch.int64
    assert bits.count().item() == len(wanted) and bits.count().dtype == torch.int64
    anywhere = torch.arange(len(flags)).flip(0)
    assert bits.at(anywhere).tolist() == [int(flag) for flag in reversed(flags)]


@given(FLAGS, st.data())
def test_flags_of_a_range(flags, data):
    start = 8 * data.draw(st.integers(0, len(flags) // 8))
    stop = data.draw(st.integers(start, len(flags)))
    assert bits_of(flags).flags(start, stop).tolist() == flags[start:stop]


def test_a_range_must_start_at_a_byte():
    with pytest.raises(ValueError, match="multiples of 8, not from 3"):
        bits_of([True] * 20).flags(3, 10)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=70))
def test_set_algebra(pairs):
    a, b = (bits_of([pair[i] for pair in pairs]) for i in (0, 1))
    first, second = members(a), members(b)
    assert members(a | b) == first | second
    assert members(a & b) == first & second
    assert members(a - b) == first - second
    assert members(~a) == set(range(len(pairs))) - first
    assert (members(a), members(b)) == (first, second), "operands are left alone"


@given(FLAGS, st.randoms(use_true_random=False))
def test_adding_positions(flags, random):
    bits, missing = bits_of(flags), [i for i, flag in enumerate(flags) if not flag]
    new = random.sample(missing, random.randint(0, len(missing)))
    before = members(bits)
    bits.add_(torch.tensor(new, dtype=torch.int64))
    assert members(bits) == before | set(new)


@pytest.mark.parametrize("numel", [0, 1, 8, 9])
def test_the_empty_set(numel):
    empty = Bits.empty(numel)
    assert members(empty) == set() and empty.numel == numel
    assert members(~empty) == set(range(numel))
    assert empty.positions().tolist() == [] and empty.count().item() == 0


def test_a_matrix_is_read_row_by_row():
    matrix = torch.tensor([[True, False, False], [False, True, True]])
    assert members(Bits.of(matrix)) == {0, 4, 5}
    assert members(Bits.of(matrix.t())) == {0, 3, 5}


@given(st.binary(max_size=40))
def test_pack_is_the_inverse_of_unpack(raw):
    data = torch.tensor(list(raw), dtype=torch.uint8)
    flags = unpack(data)
    assert flags.tolist() == np.unpackbits(np.frombuffer(raw, dtype=np.uint8)).tolist()
    assert torch.equal(pack(flags), data)
    assert torch.equal(pack(flags.bool()), data)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks(device):
    device = torch.device(device)
    size = module.chunk_size(device)
    assert size % 8 == 0
    assert list(chunks(0, device)) == []
    assert list(chunks(size, device)) == [(0, size)]
    assert list(chunks(2 * size + 5, device)) == [
        (0, size),
        (size, 2 * size),
        (2 * size, 2 * size + 5),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 1000, 4099])
def test_the_same_on_a_gpu(numel):
    flags = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.3
    here, there = Bits.of(flags), Bits.of(flags.cuda())
    for a, b in ((here, there), (~here, ~there), (here - ~here, there - ~there)):
        assert torch.equal(a.data, b.data.cpu())
        assert torch.equal(a.flags(), b.flags().cpu())
        assert torch.equal(a.positions(), b.positions().cpu())
        assert a.count().item() == b.count().item()
    there.add_((~there).positions())
    assert int(there.count()) == numel
