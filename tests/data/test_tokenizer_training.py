"""Requests that the text or the kind cannot meet are refused."""

import pytest

from sparse_gpt.data.tokenizer_training import train_tokenizer
from sparse_gpt.errors import UserError
from tests.data.fixtures import prose


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "sentencepiece-bpe"])
def test_more_tokens_than_the_text_supports(kind):
    with pytest.raises(UserError, match="--vocab-size 5000"):
        train_tokenizer(kind, iter([prose(0, 300)]), 5000)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "sentencepiece-bpe"])
def test_vocabulary_below_the_bytes(kind):
    with pytest.raises(UserError, match="needs at least"):
        train_tokenizer(kind, iter([prose(0, 300)]), 256)
    with pytest.raises(UserError, match="--vocab-size is needed"):
        train_tokenizer(kind, iter([prose(0, 300)]))


def test_unknown_kind_and_size_of_bytes():
    with pytest.raises(UserError, match="none of sentencepiece"):
        train_tokenizer("wordpiece", iter(["a"]), 300)
    with pytest.raises(UserError, match="always has 257"):
        train_tokenizer("bytes", iter(["a"]), 300)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "sentencepiece-bpe"])
def test_odd_training_text_does_no_harm(kind):
    odd = ["\0 nul \0", "z" * 20_000, "\t\t\t", "", "\n\n", "日本" * 3000]
    tokenizer = train_tokenizer(kind, iter([*odd, *(prose(i, 500) for i in range(6))]), 350)
    for text in odd:
        assert tokenizer.decode(tokenizer.encode(text)) == text
