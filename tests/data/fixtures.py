"""Small texts and prepared folders that the tests of `sparse_gpt.data` make for themselves."""

import random
from pathlib import Path

import numpy as np

from sparse_gpt.data.shard_index import FORMAT, VERSION, ShardIndex, write_index
from sparse_gpt.data.shard_writer import SplitWriter
from sparse_gpt.data.tokenizer import Tokenizer, byte_tokenizer

# Everything a careless tokenizer loses or changes.
AWKWARD = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tx\t\n",
    " leading and trailing  ",
    "a\r\nb\rc\n",
    "def f(x):\n    if x:\n        return  x  # two  blanks\n\n\n\tdone",
    "don't I'll we've they're it's",
    "1234567890 3.14 1,000,000 $5 50%",
    "日本語の文章、漢字とかな。中文没有空格",
    "naïve café ﬁne ﬀ Å Å é é",
    "😀 family 👩‍👩‍👧‍👦 flag 🇩🇪 tone 👍🏽",
    "\u00a0nbsp\u2003em\u3000wide\u200bzero\ufeffbom",
    "\x00\x01\x1f\x7f control",
    "русский العربية עברית हिन्दी ไทย",
    "<s> <unk> <pad> [CLS] <0x0A> <0x41>",
    "x" * 300 + " " * 50 + "y" * 300,
]

_WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "that",
    "it",
    "was",
    "his",
    "he",
    "with",
    "as",
    "had",
    "for",
    "on",
    "at",
    "by",
    "her",
    "which",
    "not",
    "be",
    "from",
    "horse",
    "river",
    "winter",
    "lantern",
    "quarrel",
    "orchard",
    "physician",
    "harvest",
    "carriage",
    "letter",
    "silence",
    "morning",
    "street",
    "window",
    "garden",
    "remember",
    "follow",
    "answer",
    "whisper",
    "gather",
    "wander",
    "promise",
    "green",
    "heavy",
    "quiet",
    "sudden",
    "gentle",
    "narrow",
    "bitter",
    "golden",
    "little",
    "ancient",
]


def prose(seed: int, words: int) -> str:
    """Made-up sentences with paragraphs, quotation marks and an odd character now and then."""
    rng = random.Random(seed)
    out: list[str] = []
    while len(out) < words:
        sentence = [rng.choice(_WORDS) for _ in range(rng.randint(4, 14))]
        sentence[0] = sentence[0].capitalize()
        text = " ".join(sentence) + rng.choice([".", ".", "?", "!", "; yes,", " (so)."])
        out += text.split(" ")
        if rng.random() < 0.2:
            out[-1] += rng.choice(["\n", "\n\n", "\n    ", " \u2014", " caf\u00e9"])
    return " ".join(out)


def make_folder(
    folder: Path,
    splits: dict[str, list[list[int]]],
    vocab_size: int = 257,
    eos_id: int = 256,
    dtype: str = "uint16",
    shard_tokens: int = 1000,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A prepared folder that holds exactly these documents (an end token is added to each).

    tokenizer: lies in the folder, by default that of bytes, whatever vocab_size says."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, documents in splits.items():
        writer = SplitWriter(folder, name, dtype, vocab_size, shard_tokens)
        for tokens in documents:
            writer.add(np.array([*tokens, eos_id]), n_bytes=0, n_words=0, ends_document=True)
        entries[name] = writer.close()
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save(folder / "tokenizer")
    index = ShardIndex(
        format=FORMAT,
        version=VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_id=eos_id,
        tokenizer_sha256=tokenizer.sha256,
        source={},
        options={},
        splits=entries,
    )
    write_index(folder, index)
    return folder


def random_documents(
    seed: int, n: int, longest: int = 60, vocab_size: int = 256
) -> list[list[int]]:
    """Documents of 0 to `longest` random ids below vocab_size."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(0, longest))] for _ in range(n)]
