"""Batches: the packing rule, the layout over ranks, resume, evaluation, and the thread's end."""

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.loader import (
    IGNORED_TARGET,
    PackedDataset,
    TrainLoader,
    common_vocabulary,
    eval_batches,
    eval_windows,
)
from sparse_gpt.data.shards import TokenData, open_data
from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import make_folder, random_documents

S = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    first = {"train": random_documents(1, 80), "val": random_documents(2, 20)}
    second = {"train": random_documents(3, 30), "val": random_documents(4, 3)}
    return [open_data(make_folder(root / str(i), s)) for i, s in enumerate((first, second))]


@pytest.fixture(scope="module")
def mixture(data):
    return PackedDataset([(data[0], 3.0), (data[1], 1.0)], "train", S, 7, True)


def test_items_tile_the_split(data):
    dataset = PackedDataset([(data[0], 1.0)], "train", S, seed=0)
    split = data[0].split("train")
    assert dataset.sizes == [(split.n_tokens - 1) // S]
    inputs = np.concatenate([dataset.item(0, j)["tokens"][:-1] for j in range(dataset.n_items)])
    assert np.array_equal(inputs, split.read(0, dataset.n_items * S))
    for j in (0, 5, dataset.n_items - 1):
        sample = dataset.item(0, j)
        assert np.array_equal(sample["tokens"], split.read(j * S, S + 1))
        assert sample["document_ids"] is None


def test_an_epoch_has_every_item_once(data):
    dataset = PackedDataset([(data[0], 1.0)], "train", S, seed=0)
    seen = {dataset.sample(i)["tokens"].tobytes() for i in range(dataset.n_items)}
    every = {dataset.item(0, j)["tokens"].tobytes() for j in range(dataset.n_items)}
    assert seen == every
    assert dataset.sample(0)["tokens"].tobytes() != dataset.item(0, 0)["tokens"].tobytes()


def test_exactly_one_sequence_is_enough(tmp_path):
    made = open_data(make_folder(tmp_path / "x", {"train": [[1] * S]}))  # S tokens and the end
    assert PackedDataset([(made, 1.0)], "train", S, 0).n_items == 1
    with pytest.raises(UserError, match=rf"fewer than one sequence of seq_len {S + 1}"):
        PackedDataset([(made, 1.0)], "train", S + 1, 0)


def test_batch_shapes_and_documents(mixture):
    loader = TrainLoader(mixture, 4)
    with loader.batches() as stream:
        batch = next(stream)
    assert batch["input_ids"].shape == batch["targets"].shape == (4, S)
    assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
    assert batch["document_ids"].shape == (4, S)
    assert batch["document_ids"].dtype == torch.int32
    assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
    for row in range(4):
        sample = mixture.sample(row)
        assert batch["input_ids"][row].tolist() == sample["tokens"][:-1].tolist()
        # A document's number changes after its end token and nowhere else.
        ends = batch["input_ids"][row][:-1] == 256
        changes = batch["document_ids"][row].diff() != 0
        assert torch.equal(ends, changes)


def _rows(dataset, micro, rank, world, accumulation, consumed, n) -> list[list[int]]:
    with TrainLoader(dataset, micro, rank, world, accumulation).batches(consumed) as stream:
        return [row.tolist() for _ in range(n) for row in next(stream)["input_ids"]]


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from([(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (6, 2, 1)]),
    consumed=st.integers(0, 5000),
)
def test_a_global_batch_is_the_same_for_every_layout(mixture, layout, consumed):
    micro, world, accumulation = layout
    rows = [
        row
        for rank in range(world)
        for row in _rows(mixture, micro, rank, world, accumulation, consumed, accumulation)
    ]
    expected = [mixture.sample(i)["tokens"][:-1].tolist() for i in range(consumed, consumed + 12)]
    assert sorted(rows) == sorted(expected)


def test_place_of_every_sample(mixture):
    micro, world, accumulation, consumed = 2, 3, 2, 24
    for rank in range(world):
        rows = _rows(mixture, micro, rank, world, accumulation, consumed, 2 * accumulation)
        places = [
            consumed + (a * world + rank) * micro + m
            for a in range(2 * accumulation)
            for m in range(micro)
        ]
        assert rows == [mixture.sample(i)["tokens"][:-1].tolist() for i in places]


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_resume_is_the_tail_of_the_stream(mixture, steps):
    micro, world, accumulation = 2, 2, 3
    loader_args = (mixture, micro, 1, world, accumulation)
    whole = _rows(*loader_args, 0, 15 * accumulation)
    rest = _rows(*loader_args, steps * micro * world * accumulation, (15 - steps) * accumulation)
    assert rest == whole[steps * accumulation * micro :]


def test_mixture_shares(data, mixture):
    assert mixture.order.consumed(1000) == [750, 250]
    alone = PackedDataset([(data[0], 2.0)], "train", S, 7)
    assert alone.order.consumed(5) == [5]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_evaluation_covers_every_window_once(data, world, limit):
    dataset = PackedDataset([(data[0], 1.0), (data[1], 1.0)], "val", S, 0, True)
    windows = eval_windows(dataset, limit)
    assert len(windows) == len(set(windows)) == (limit or dataset.n_items)
    ranks = [list(eval_batches(dataset, 4, r, world, limit)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-len(windows) // (4 * world))
    rows = []
    for step in range(len(ranks[0])):
        for batches in ranks:
            batch = batches[step]
            assert batch["input_ids"].shape == batch["document_ids"].shape == (4, S)
            ignored = batch["targets"] == IGNORED_TARGET
            assert (ignored.all(dim=1) == ignored.any(dim=1)).all()
            rows += batch["targets"][~ignored.any(dim=1)].tolist()
    assert rows == [dataset.item(*window)["tokens"][1:].tolist() for window in windows]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_padding_rows_leave_the_inputs_alone(data, batch_size):
    """A rank with no rows left gets ignored targets and real inputs, at any batch size."""
    dataset = PackedDataset([(data[0], 1.0)], "val", S, 0)
    for rank in range(3):
        for batch in eval_batches(dataset, batch_size, rank, 3, 4):
            assert int(batch["input_ids"].min()) >= 0


def test_limited_evaluation_spreads_over_the_split(data):
    dataset = PackedDataset([(data[0], 1.0)], "val", S, 0)
    windows = eval_windows(dataset, 5)
    assert windows[0] == (0, 0)
    assert windows[-1][1] >= dataset.n_items * 0.7
    assert eval_windows(dataset, 10**9) == [(0, j) for j in range(dataset.n_items)]


def test_bad_settings(data, tmp_path):
    with pytest.raises(UserError, match="seq_len is 0"):
        PackedDataset([(data[0], 1.0)], "train", 0, 0)
    with pytest.raises(UserError, match="at least one source"):
        PackedDataset([], "train", S, 0)
    with pytest.raises(UserError, match="no split 'test'"):
        PackedDataset([(data[0], 1.0)], "test", S, 0)
    with pytest.raises(UserError, match="weight of source 0"):
        PackedDataset([(data[0], -1.0)], "train", S, 0)
    dataset = PackedDataset([(data[0], 1.0)], "train", S, 0)
    with pytest.raises(UserError, match="micro_batch_size is 0"):
        TrainLoader(dataset, 0)
    with pytest.raises(UserError, match="accumulation is 0"):
        TrainLoader(dataset, 1, accumulation=0)
    with pytest.raises(ValueError, match="rank 2"):
        TrainLoader(dataset, 1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="samples_consumed"):
        TrainLoader(dataset, 1).batches(-1)
    with pytest.raises(UserError, match="max_sequences is 0"):
        eval_windows(dataset, 0)
    with pytest.raises(UserError, match="evaluation batch size is 0"):
        next(eval_batches(dataset, 0))


def _source(name: str, vocab_size: int, eos_id: int, sha256: str | None) -> TokenData:
    return TokenData(Path(name), vocab_size, eos_id, sha256, None, {}, identity=name)


A, B = "a" * 64, "b" * 64


def test_common_vocabulary(data):
    assert common_vocabulary(data) == (257, 256)
    assert common_vocabulary([_source("x", 300, 7, A)]) == (300, 7)
    # A pair without a tokenizer guesses its end token; the known one counts.
    mixed = [_source("pair", 300, 5, None), _source("x", 300, 7, A), _source("y", 300, 7, A)]
    assert common_vocabulary(mixed) == (300, 7)
    assert common_vocabulary([_source("p", 300, 5, None), _source("q", 300, 6, None)]) == (300, 5)


@pytest.mark.parametrize(
    "sources",
    [
        [_source("x", 300, 7, A), _source("y", 300, 7, B)],
        [_source("x", 300, 7, A), _source("y", 301, 7, A)],
        [_source("x", 300, 7, A), _source("y", 301, 7, None)],
        [_source("x", 300, 7, None), _source("y", 301, 7, None)],
        # Neither may hide behind a pair that says nothing.
        [_source("pair", 300, 7, None), _source("x", 300, 7, A), _source("y", 300, 7, B)],
    ],
)
def test_different_vocabularies(sources):
    with pytest.raises(UserError) as error:
        common_vocabulary(sources)
    for source in sources[-2:]:
        known = source.tokenizer_sha256
        tokenizer = "unknown" if known is None else f"sha256 {known[:12]}"
        said = f"{source.path} has vocab_size {source.vocab_size}, tokenizer {tokenizer}"
        assert said in str(error.value)


def test_sources_of_different_tokenizers(data, tmp_path):
    trained = train_tokenizer("bpe", iter(["some text"]), 257)
    other = make_folder(tmp_path / "x", {"train": random_documents(9, 9)}, tokenizer=trained)
    with pytest.raises(UserError, match="different tokenizers"):
        PackedDataset([(data[0], 1.0), (open_data(other), 1.0)], "train", S, 0)


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch-prefetch"]


def test_the_thread_reads_ahead_and_no_further(mixture):
    asked = []

    class Counting:
        def sample(self, i):
            asked.append(i)
            return mixture.sample(i)

    stream = TrainLoader(Counting(), 1, prefetch=3).batches()  # pyright: ignore[reportArgumentType]
    for taken in range(4):
        deadline = time.monotonic() + 30
        while len(asked) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert asked == list(range(taken + 3))
        next(stream)
    stream.close()


def test_the_thread_ends(mixture):
    stream = TrainLoader(mixture, 2).batches()
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert not _prefetch_threads()
    abandoned = TrainLoader(mixture, 2).batches()
    next(abandoned)
    (thread,) = _prefetch_threads()
    del abandoned
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
    with pytest.raises(KeyError, match="mine"), TrainLoader(mixture, 2).batches():
        raise KeyError("mine")
    assert not _prefetch_threads()


def test_errors_of_the_thread_reach_the_consumer(mixture):
    class Failing:
        def sample(self, i):
            if i == 3:
                raise UserError("token 3 is damaged")
            return mixture.sample(i)

    with TrainLoader(Failing(), 1).batches() as stream:  # pyright: ignore[reportArgumentType]
        for _ in range(3):
            next(stream)
        for _ in range(2):
            with pytest.raises(UserError, match="token 3 is damaged"):
                next(stream)
    assert not _prefetch_threads()
