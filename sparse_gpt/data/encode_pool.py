"""Tokenising a stream in worker processes, results in the order of the stream."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.errors import UserError

PART_CHARACTERS = 1 << 18
_TASK_CHARACTERS = 1 << 20
_TASK_PARTS = 4096
_AHEAD = 3  # tasks a worker that wait for it: bounds memory and hides the pipe's delay


class Part(NamedTuple):
    """A piece of a document. words: of the whole document, on the part that ends it."""

    split: str
    text: str
    words: int
    ends_document: bool


class EncodedPart(NamedTuple):
    """A part's tokens (uint32, the end token included on the last part) and UTF-8 bytes."""

    split: str
    tokens: np.ndarray
    n_bytes: int
    words: int
    ends_document: bool


def parts_of(tokenizer: Tokenizer, split: str, text: str, words: int) -> Iterator[Part]:
    """Cut a document where that changes no token, so that one long document keeps several
    workers busy and no encoding of a whole book has to fit in memory."""
    pieces = tokenizer.parts(text, PART_CHARACTERS)
    current = next(pieces)
    for following in pieces:
        yield Part(split, current, 0, False)
        current = following
    yield Part(split, current, words, True)


def _tasks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    task: list[Part] = []
    size = 0
    for part in parts:
        task.append(part)
        size += len(part.text)
        if size >= _TASK_CHARACTERS or len(task) >= _TASK_PARTS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode_task(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[np.ndarray, int]]:
    encoded = tokenizer.encode_batch(texts)
    return [
        (np.array(ids, dtype=np.uint32), len(text.encode())) for ids, text in zip(encoded, texts)
    ]


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # Processes are the parallelism here: threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes nothing down; its workers must not stay behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> list[tuple[np.ndarray, int]]:
    assert _worker_tokenizer is not None
    return _encode_task(_worker_tokenizer, texts)


def encode_parts(
    tokenizer: Tokenizer, parts: Iterable[Part], workers: int
) -> Iterator[EncodedPart]:
    """Encode parts in order with `workers` processes (1: in this process).

    Memory is bounded by a few tasks a worker. The result does not depend on `workers`.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}, it must be at least 1")
    if workers == 1:
        for task in _tasks(parts):
            yield from _finished(task, _encode_task(tokenizer, [p.text for p in task]), tokenizer)
        return
    with contextlib.ExitStack() as stack:
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer,),
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        waiting: deque[tuple[list[Part], Future]] = deque()
        try:
            for task in _tasks(parts):
                waiting.append((task, pool.submit(_work, [part.text for part in task])))
                if len(waiting) >= workers * _AHEAD:
                    first, future = waiting.popleft()
                    yield from _finished(first, future.result(), tokenizer)
            while waiting:
                first, future = waiting.popleft()
                yield from _finished(first, future.result(), tokenizer)
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising worker died (out of memory?); lower --workers and run again"
            ) from error


def _finished(
    task: list[Part], encoded: list[tuple[np.ndarray, int]], tokenizer: Tokenizer
) -> Iterator[EncodedPart]:
    for part, (tokens, n_bytes) in zip(task, encoded, strict=True):
        if part.ends_document:
            tokens = np.append(tokens, np.uint32(tokenizer.eos_id))
        yield EncodedPart(part.split, tokens, n_bytes, part.words, part.ends_document)
