"""From token files to batches: packed sequences, dealt to ranks, read ahead by a thread."""

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch

from sparse_gpt.data.order import SampleOrder
from sparse_gpt.data.shards import TokenData
from sparse_gpt.errors import UserError

IGNORED_TARGET = -100


class Sample(TypedDict):
    """tokens: int64 [seq_len + 1]. document_ids: int32 [seq_len], or None."""

    tokens: np.ndarray
    document_ids: np.ndarray | None


class Batch(TypedDict):
    """input_ids, targets: int64 [batch, seq_len]. document_ids: int32, same shape, or None."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None


class PackedDataset:
    """Sequences of seq_len tokens and their next tokens, from one split of weighted sources.

    Item j of a source is its tokens [j*S, j*S + S + 1): inputs overlap nowhere, each target is
    the following token, and a source has (n_tokens - 1) // S items (a shorter tail is not used).
    Documents are packed end to end; with document_attention the document number of every input
    comes along, so that attention can stop at their borders.
    Raises UserError for sources of different tokenizers, bad weights, or too short a split.
    """

    def __init__(
        self,
        data: Sequence[tuple[TokenData, float]],
        split: str,
        seq_len: int,
        seed: int,
        document_attention: bool = False,
    ):
        if seq_len < 1:
            raise UserError(f"seq_len is {seq_len}, it must be at least 1")
        self.split, self.seq_len, self.document_attention = split, seq_len, document_attention
        self.vocab_size, self.eos_id = common_vocabulary([source for source, _ in data])
        self._splits = [source.split(split) for source, _ in data]
        self._paths = [source.path for source, _ in data]
        self.sizes = []
        for source, tokens in zip((source for source, _ in data), self._splits):
            size = (tokens.n_tokens - 1) // seq_len
            if size < 1:
                raise UserError(
                    f"data path {source.path}: split {split!r} has {tokens.n_tokens} tokens, fewer "
                    f"than one sequence of seq_len {seq_len} + 1; lower seq_len or give more text"
                )
            self.sizes.append(size)
        self.order = SampleOrder(seed, self.sizes, [weight for _, weight in data])

    @property
    def n_items(self) -> int:
        """Sequences in one pass over every source."""
        return sum(self.sizes)

    def item(self, source: int, item: int) -> Sample:
        """Item `item` of source `source`, in the order they lie in the files."""
        split, start = self._splits[source], item * self.seq_len
        tokens = split.read(start, self.seq_len + 1)
        documents = split.document_ids(start, self.seq_len) if self.document_attention else None
        return {"tokens": tokens, "document_ids": documents}

    def sample(self, i: int) -> Sample:
        """Sample i of the shuffled, endless training stream."""
        return self.item(*self.order.locate(i))

    def describe(self, i: int) -> str:
        """Where sample i lies: its source, tokens and documents, all counted from 0."""
        source, item = self.order.locate(i)
        start, stop = item * self.seq_len, (item + 1) * self.seq_len
        documents = self._splits[source].document_ids(start, self.seq_len)
        first, last = int(documents[0]), int(documents[-1])
        of = f"document {first}" if first == last else f"documents {first} to {last}"
        where = f"tokens {start} to {stop - 1} of {self._paths[source]}, {self.split}, {of}"
        return f"sample {i}: {where}"


def common_vocabulary(sources: Sequence[TokenData]) -> tuple[int, int]:
    """(vocab_size, eos_id) of sources that one run can mix: of one tokenizer.

    Of a source without a known tokenizer (a Megatron pair given none) only the vocabulary's size
    can be compared; its end token is a guess, which gives way to that of a known tokenizer.
    Raises UserError naming two sources that differ, their vocabularies and tokenizer hashes.
    """
    if not sources:
        raise UserError("data: at least one source is needed")
    first = next((source for source in sources if source.tokenizer_sha256), sources[0])
    for other in sources:
        both_known = first.tokenizer_sha256 is not None and other.tokenizer_sha256 is not None
        if other.vocab_size != first.vocab_size or (
            both_known and other.tokenizer_sha256 != first.tokenizer_sha256
        ):
            raise UserError(
                f"data: different tokenizers: {_vocabulary(first)}; {_vocabulary(other)}; prepare "
                "both with one --tokenizer, or give a Megatron pair its tokenizer or vocab_size"
            )
    return first.vocab_size, first.eos_id


def _vocabulary(source: TokenData) -> str:
    known = source.tokenizer_sha256
    tokenizer = "unknown" if known is None else f"sha256 {known[:12]}"
    return f"{source.path} has vocab_size {source.vocab_size}, tokenizer {tokenizer}"


def _collate(samples: Sequence[Sample]) -> Batch:
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))
    documents = [sample["document_ids"] for sample in samples]
    present = [ids for ids in documents if ids is not None]
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].clone(),
        "document_ids": torch.from_numpy(np.stack(present)) if present else None,
    }


class TrainLoader:
    """Micro-batches of one rank; a pure function of the number of samples consumed.

    A global batch is micro_batch_size * world_size * accumulation consecutive samples. Of the
    batch that starts at sample s, micro-step a of rank r gets the samples
    s + (a * world_size + r) * micro_batch_size + [0, micro_batch_size), so a global batch has
    the same samples for any layout of the same size.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        prefetch: int = 4,
    ):
        for name, value in (
            ("micro_batch_size", micro_batch_size),
            ("world_size", world_size),
            ("accumulation", accumulation),
            ("prefetch", prefetch),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}, it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.prefetch = prefetch

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.world_size * self.accumulation

    def batches(self, samples_consumed: int = 0) -> "BatchStream":
        """Micro-batches from that sample on, `accumulation` of them a global batch, without end.

        samples_consumed is that of the whole run over all ranks; it need not be a multiple of
        the global batch. Close the stream (or use it in `with`) to end its thread.
        """
        if samples_consumed < 0:
            raise ValueError(f"samples_consumed is {samples_consumed}")
        return BatchStream(self._produce(samples_consumed), self.prefetch)

    def _produce(self, start: int) -> Iterator[Batch]:
        micro = self.micro_batch_size
        first = start + self.rank * micro
        while True:
            yield _collate([self.dataset.sample(i) for i in range(first, first + micro)])
            first += self.world_size * micro


class BatchStream(Iterator[Batch]):
    """An iterator that a background thread fills ahead, at most `prefetch` batches.

    An exception of the thread is raised by `next`. The thread ends on `close`, on leaving
    `with`, and when the stream is collected.
    """

    def __init__(self, batches: Iterator[Batch], prefetch: int):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        # The thread must not hold the stream itself, or it would never be collected.
        self._thread = threading.Thread(
            target=_fill,
            args=(batches, self._queue, self._slots, self._stop),
            name="batch-prefetch",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end_thread, self._stop, self._slots)
        self._done: BaseException | None = None
        self._thread.start()

    def __next__(self) -> Batch:
        if self._done is not None:
            raise self._done
        if self._stop.is_set():
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self._done = error
            raise error
        self._slots.release()
        return batch

    def close(self) -> None:
        """End the thread and wait for it."""
        self._end()
        self._thread.join()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _end_thread(stop: threading.Event, slots: threading.Semaphore) -> None:
    stop.set()
    slots.release()  # wakes a thread that waits for room


def _fill(
    batches: Iterator[Batch],
    out: queue.SimpleQueue,
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        while True:
            slots.acquire()
            if stop.is_set():
                return
            out.put((next(batches), None))
    except BaseException as error:  # handed to the consumer, who raises it
        out.put((None, error))


def eval_windows(dataset: PackedDataset, max_sequences: int | None = None) -> list[tuple[int, int]]:
    """(source, item) of the sequences to evaluate: all in file order, or `max_sequences` of them
    spread evenly over the split."""
    if max_sequences is not None and max_sequences < 1:
        raise UserError(f"max_sequences is {max_sequences}, it must be at least 1")
    total = dataset.n_items
    wanted = total if max_sequences is None else min(total, max_sequences)
    ends = np.cumsum(dataset.sizes)
    windows = []
    for k in range(wanted):
        place = k * total // wanted
        source = int(np.searchsorted(ends, place, side="right"))
        windows.append((source, place - int(ends[source]) + dataset.sizes[source]))
    return windows


def eval_batches(
    dataset: PackedDataset,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    max_sequences: int | None = None,
) -> Iterator[Batch]:
    """The split in order, dealt to ranks: batch b of rank r holds the windows
    (b * world_size + r) * batch + [0, batch).

    Every rank gets the same number of batches of the same shape; rows past the end have all
    targets IGNORED_TARGET and must not count.
    """
    if batch < 1:
        raise UserError(f"evaluation batch size is {batch}, it must be at least 1")
    windows = eval_windows(dataset, max_sequences)
    for first in range(0, len(windows), batch * world_size):
        begin = first + rank * batch
        mine = windows[begin : begin + batch]
        # A rank with nothing left repeats the first window, all of it ignored.
        rows = mine + [windows[0]] * (batch - len(mine))
        out = _collate([dataset.item(source, item) for source, item in rows])
        out["targets"][len(mine) :] = IGNORED_TARGET
        yield out
