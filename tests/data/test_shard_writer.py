"""Writing in parts, and refusing what does not fit."""

import numpy as np
import pytest

from sparse_gpt.data.shard_writer import SplitWriter, dtype_for
from sparse_gpt.durable import sha256_file
from sparse_gpt.errors import UserError


def test_dtype_follows_the_vocabulary():
    assert dtype_for(65_536) == "uint16"
    assert dtype_for(65_537) == "uint32"
    assert dtype_for(257, "uint32") == "uint32"
    with pytest.raises(UserError, match="--dtype uint16 holds 65,536 ids"):
        dtype_for(65_537, "uint16")
    with pytest.raises(UserError, match="none of auto"):
        dtype_for(10, "int16")
    with pytest.raises(UserError, match="does not fit"):
        dtype_for(2**32 + 1)


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10_000])
def test_parts_and_shards(tmp_path, shard_tokens):
    tokens = np.random.default_rng(0).integers(0, 1000, 500).astype(np.uint32)
    writer = SplitWriter(tmp_path, "train", "uint16", 1000, shard_tokens)
    for start in range(0, 500, 30):
        part = tokens[start : start + 30]
        writer.add(part, n_bytes=3, n_words=2, ends_document=start % 60 == 30)
    entry = writer.close()
    assert (entry.tokens, entry.documents, entry.bytes, entry.words) == (500, 8, 51, 34)
    read = b"".join((tmp_path / shard.file).read_bytes() for shard in entry.shards)
    assert read == tokens.astype("<u2").tobytes()
    assert [shard.tokens for shard in entry.shards[:-1]] == [shard_tokens] * (len(entry.shards) - 1)
    for shard in entry.shards:
        assert shard.sha256 == sha256_file(tmp_path / shard.file)
    starts = np.load(tmp_path / entry.documents_file)
    assert starts.dtype == np.uint64
    assert starts.tolist() == [0, *range(60, 481, 60)]
    assert sorted(path.suffix for path in tmp_path.iterdir()).count(".tmp") == 0


def test_ids_outside_the_vocabulary(tmp_path):
    writer = SplitWriter(tmp_path, "train", "uint16", 100)
    with pytest.raises(UserError, match="token id 100 is outside the vocabulary of 100"):
        writer.add(np.array([1, 100]), n_bytes=0, n_words=0, ends_document=True)
    writer.abort()


def test_empty_split(tmp_path):
    entry = SplitWriter(tmp_path, "val", "uint16", 100).close()
    assert (entry.tokens, entry.documents, entry.shards) == (0, 0, [])
