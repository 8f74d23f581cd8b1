"""A small corpus of our own, with structure to learn, as prepared token shards."""

from pathlib import Path

import numpy as np

from sparse_gpt.data.order import mix64
from sparse_gpt.data.shard_index import ShardIndex, write_index
from sparse_gpt.data.shard_writer import SplitWriter
from sparse_gpt.data.tokenizer import byte_tokenizer

NOUNS = "weight mask layer token shard rank block head gradient moment".split()
VERBS = "drops grows masks splits widens reads sums clips".split()
PLACES = "in the loop|after the step|at the boundary|over every rank|under the norm".split("|")


def sentence(number: int) -> str:
    """The n-th sentence: a pure function of n."""
    r = mix64(number)
    first, second = NOUNS[r % 10], NOUNS[(r >> 8) % 10]
    return f"The {first} {VERBS[(r >> 16) % 8]} the {second} {PLACES[(r >> 24) % 5]}."


def document(number: int, sentences: int = 12) -> str:
    return " ".join(sentence(number * sentences + i) for i in range(sentences)) + "\n"


def write_corpus(folder: Path, documents: int = 300, val_documents: int = 20) -> Path:
    """Byte-tokenised shards of `documents` training documents; returns the folder."""
    ends = (documents, documents + val_documents, documents + 2 * val_documents)
    texts = [document(number) for number in range(ends[-1])]
    return write_texts(folder, texts[: ends[0]], texts[ends[0] : ends[1]], texts[ends[1] :])


def write_texts(folder: Path, train: list[str], val: list[str], test: list[str]) -> Path:
    """Byte-tokenised shards of documents; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, texts in (("train", train), ("val", val), ("test", test)):
        writer = SplitWriter(folder, split, "uint16", tokenizer.vocab_size)
        for text in texts:
            ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
            writer.add(
                ids, n_bytes=len(text.encode()), n_words=len(text.split()), ends_document=True
            )
        splits[split] = writer.close()
    index = ShardIndex(
        format="sparse_gpt-tokens",
        version=1,
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        source={"kind": "tests/tiny.py"},
        options={},
        splits=splits,
    )
    write_index(folder, index)
    return folder
