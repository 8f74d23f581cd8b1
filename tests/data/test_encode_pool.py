"""Workers give the same tokens in the same order, lazily, and none stays behind."""

import multiprocessing
import os

import numpy as np
import pytest

from sparse_gpt.data import encode_pool
from sparse_gpt.data.encode_pool import Part, encode_parts, parts_of
from sparse_gpt.data.tokenizer import byte_tokenizer
from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import AWKWARD, prose

TEXTS = [text for text in AWKWARD if text] + [prose(seed, 400) for seed in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", iter(TEXTS), 400)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    monkeypatch.setattr(encode_pool, "PART_CHARACTERS", 300)
    monkeypatch.setattr(encode_pool, "_TASK_CHARACTERS", 2000)


def _parts(tokenizer):
    for number, text in enumerate(TEXTS):
        yield from parts_of(tokenizer, "val" if number % 3 else "train", text, number)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_come_back_in_order(tokenizer, workers):
    documents, current, size, words = [], [], 0, []
    for part in encode_parts(tokenizer, _parts(tokenizer), workers):
        current += part.tokens.tolist()
        size += part.n_bytes
        if part.ends_document:
            documents.append(current)
            words.append(part.words)
            current = []
    assert documents == [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert words == list(range(len(TEXTS)))
    assert size == sum(len(text.encode()) for text in TEXTS)


def test_long_documents_become_several_parts(tokenizer):
    parts = list(parts_of(tokenizer, "train", prose(1, 1000), 1000))
    assert len(parts) > 5
    assert [part.ends_document for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(part.words for part in parts) == 1000


@pytest.mark.parametrize("workers", [1, 2])
def test_input_is_read_only_a_little_ahead(tokenizer, workers):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield Part("train", "some text of no great length " * 10, 60, True)

    encoded = encode_parts(tokenizer, endless(), workers)
    for _ in range(20):
        next(encoded)
    encoded.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert read < 200
    assert not multiprocessing.active_children()


def test_errors_of_the_input_end_the_pool(tokenizer):
    def failing():
        yield from _parts(tokenizer)
        raise UserError("row 7 is damaged")

    with pytest.raises(UserError, match="row 7 is damaged"):
        list(encode_parts(tokenizer, failing(), 2))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_reported(tokenizer):
    encoded = encode_parts(tokenizer, (p for _ in range(100) for p in _parts(tokenizer)), 2)
    next(encoded)
    for child in multiprocessing.active_children():
        os.kill(child.pid, 9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="a tokenising worker died"):
        list(encoded)
    assert not multiprocessing.active_children()


def test_number_of_workers():
    with pytest.raises(UserError, match="--workers is 0"):
        list(encode_parts(byte_tokenizer(), [], 0))


def test_nothing_to_encode():
    assert list(encode_parts(byte_tokenizer(), [], 1)) == []
    assert parts_of(byte_tokenizer(), "train", "x", 1).__next__() == Part("train", "x", 1, True)
    (part,) = encode_parts(byte_tokenizer(), [Part("train", "é", 1, True)], 1)
    assert part.tokens.dtype == np.uint32
    assert part.tokens.tolist() == [0xC3, 0xA9, 256]
