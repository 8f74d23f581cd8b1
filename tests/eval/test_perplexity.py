"""Perplexity against a plain loop with transformers' own loss, and the rules of counting."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import perplexity
from eval.model_folder import open_folders
from eval.text_source import Text, dataset_text, limited, local_text, total
from sparse_gpt.errors import UserError
from tests.eval.conftest import POSITIONS, sentence

TEXT = "\n".join(" ".join(sentence(n + 7 * line) for n in range(5)) for line in range(12)) + "\n"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(TEXT)
    return path


@given(targets=st.integers(1, 300), max_length=st.integers(1, 50), data=st.data())
@settings(deadline=None)
def test_every_token_is_scored_once_with_enough_context(
    targets: int, max_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, max_length))
    plan = list(perplexity.windows(targets, max_length, stride))
    scored = [target for w in plan for target in range(w.end - w.scored, w.end)]
    assert scored == list(range(targets))
    assert all(w.start + stride == v.start for w, v in pairwise(plan))
    for number, window in enumerate(plan):
        assert 1 <= window.end - window.start <= max_length
        # Inputs before the one that predicts the first scored token.
        context = window.end - window.scored - window.start
        assert context >= max_length - stride or number == 0


@given(targets=st.integers(1, 300), max_length=st.integers(1, 50))
@settings(deadline=None)
def test_a_full_stride_gives_windows_that_do_not_overlap(targets: int, max_length: int) -> None:
    plan = list(perplexity.windows(targets, max_length, max_length))
    assert [(w.start, w.end) for w in plan] == [
        (start, min(start + max_length, targets)) for start in range(0, targets, max_length)
    ]
    assert all(w.scored == w.end - w.start for w in plan)


@pytest.mark.parametrize("stride", [1, 7, 32, 48])
def test_sliding_window_equals_a_loop_with_transformers_loss(model: Any, stride: int) -> None:
    """Labels of -100 leave out what a window does not score; the loss is transformers' mean."""
    import torch

    generator = torch.Generator().manual_seed(stride)
    stream = torch.randint(1, 500, (205,), generator=generator).tolist()
    max_length = 48
    # transformers shifts the labels itself: a window has one token more than it has inputs.
    expected, done = 0.0, 0
    for start in range(0, 204, stride):
        end = min(start + max_length, 204)
        ids = torch.tensor([stream[start : end + 1]])
        labels = ids.clone()
        labels[:, : done - start + 1] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        expected += loss.item() * (end - done)
        done = end
        if end == 204:
            break
    for batch_size in (1, 3):
        nll = perplexity.score_stream(
            model, stream, [False] + [True] * 204,
            max_length=max_length, stride=stride, batch_size=batch_size,
        )  # fmt: skip
        assert nll == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_tokens_that_are_context_only_are_left_out(model: Any) -> None:
    import torch

    stream = [0, *range(1, 20), 0, *range(30, 50)]
    counted = [token != 0 for token in stream]
    with torch.no_grad():
        logits = model(torch.tensor([stream])).logits[0, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(stream[1:]), reduction="none")
    expected = losses[torch.tensor(counted[1:])].sum().item()
    nll = perplexity.score_stream(model, stream, counted, max_length=64, stride=64)
    assert nll == pytest.approx(expected, abs=1e-5 * len(stream))


def test_the_result_of_a_file(
    tiny_model: Path, tokenizer: Any, model: Any, text_file: Path
) -> None:
    """All numbers of a result file from a direct computation on the whole text."""
    import torch

    (folder,) = open_folders([str(tiny_model)])
    other = text_file.with_name("second.txt")
    other.write_text(sentence(3))
    source = local_text([text_file, other], "text")
    result = perplexity.evaluate_folder(
        folder, Text("both", source), stride=POSITIONS // 2, device="cpu"
    )
    ids = [tokenizer.encode(part) for part in (TEXT, sentence(3))]
    stream = [0, *ids[0], 0, *ids[1]]
    assert len(stream) > POSITIONS, "want more than one window"
    counted = [False] + [True] * len(ids[0]) + [False] + [True] * len(ids[1])
    losses = []
    for target in range(1, len(stream)):
        if counted[target]:
            # The window that scores it: the first one of those that start every half context.
            begin = max(0, math.ceil((target - POSITIONS) / (POSITIONS // 2))) * (POSITIONS // 2)
            losses.append((begin, target))
    expected = 0.0
    with torch.no_grad():
        for begin in {begin for begin, _ in losses}:
            targets = [target for start, target in losses if start == begin]
            window = torch.tensor([stream[begin : begin + POSITIONS]])
            logp = model(window).logits[0].double().log_softmax(-1)
            expected -= sum(logp[t - 1 - begin, stream[t]].item() for t in targets)
    measured = result["perplexity"]
    words = len((TEXT + " " + sentence(3)).split())
    assert measured["nll"] == pytest.approx(expected, rel=1e-6)
    assert measured["tokens"] == len(ids[0]) + len(ids[1]) == len(losses)
    assert measured["words"] == words
    assert measured["bytes"] == len((TEXT + sentence(3)).encode())
    assert measured["documents"] == 2
    assert measured["token_perplexity"] == pytest.approx(math.exp(expected / len(losses)))
    assert measured["word_perplexity"] == pytest.approx(math.exp(expected / words))
    assert measured["bits_per_byte"] == pytest.approx(expected / math.log(2) / measured["bytes"])
    assert result["settings"]["word_rule"] == "white-space words of the original text"


@given(limit=st.integers(12, 900))
@settings(deadline=None, max_examples=25)
def test_a_limit_keeps_the_longest_prefix_of_whole_words(limit: int) -> None:
    """With one token a character, the prefix can be worked out by hand."""
    from sparse_gpt.data.corpus import standard_library

    text = _FixedText("fixed", standard_library(), documents_=("one two  three\n" * 20, "four"))
    kept = list(limited(text, lambda part: [ord(c) for c in part], limit))
    whole = "".join(text.documents_)
    got = "".join(document.text for document, _ in kept)
    assert whole.startswith(got) and len(got) <= limit
    assert sum(len(ids) for _, ids in kept) == len(got)
    if len(whole) <= limit:
        assert got == whole
    else:
        rest = whole[len(got) :]
        next_word = len(rest) - len(rest.lstrip()) + len(rest.split()[0])
        assert len(got) + next_word > limit
    assert total(text, [document for document, _ in kept]) == (len(got.split()), len(got))


class _FixedText(Text):
    """Documents that are given instead of read."""

    documents_: tuple[str, ...]

    def __init__(self, label: str, source: Any, documents_: tuple[str, ...]) -> None:
        super().__init__(label, source)
        object.__setattr__(self, "documents_", documents_)

    def documents(self) -> Any:
        return (self.document(source) for source in self.documents_)


ROWS = ["", " = First = \n", "", " It is 3 @.@ 5 m , they say . \n", " It 's so . \n", ""]
ROWS += ["", " = Second = \n", "", " = = Part = = \n", "", " Text @-@ like . \n"]


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """A mirror of a data set in WikiText's form."""
    from tests.eval.conftest import _write

    folder = tmp_path / "hub/someone/wikitext"
    _write(folder, {"tiny-v1": {"test": [{"text": row} for row in ROWS]}})
    return folder


@pytest.mark.parametrize("form", ["raw", "detokenised"])
def test_wikitext_words_are_those_of_the_original_lines(wikitext: Path, form: str) -> None:
    text = dataset_text(str(wikitext), "tiny-v1", "test", "text", form)
    documents = list(text.documents())
    official = sum(len(row.split()) + 1 for row in ROWS)
    assert total(text, documents)[0] == official
    assert len(documents) == 2
    joined = "".join(document.text for document in documents)
    assert joined.count("\n") == len(ROWS)
    assert ("3 @.@ 5 m ," in joined) == (form == "raw")
    assert ("3.5 m, they say." in joined) == (form == "detokenised")


def test_a_limit_on_detokenised_text_cuts_after_a_line(wikitext: Path) -> None:
    text = dataset_text(str(wikitext), "tiny-v1", "test", "text", "detokenised")
    lengths = [len(document.text) for document in text.documents()]
    encode = lambda part: [ord(c) for c in part]  # noqa: E731
    kept = [document for document, _ in limited(text, encode, lengths[0] - 1)]
    assert len(kept) == 1
    assert kept[0].text.endswith("\n") and kept[0].source.endswith("\n")
    assert kept[0].source.count("\n") == kept[0].text.count("\n")
    everything = [document for document, _ in limited(text, encode, sum(lengths))]
    assert everything == list(text.documents())


@pytest.mark.parametrize(("split", "official"), [("validation", 217_646), ("test", 245_569)])
@pytest.mark.parametrize("form", ["raw", "detokenised"])
def test_official_word_counts_of_wikitext_103(
    hub: Path, split: str, official: int, form: str
) -> None:
    text = dataset_text(str(hub / "Salesforce/wikitext"), "wikitext-103-v1", split, "text", form)
    assert total(text, text.documents())[0] == official


def test_the_command(tiny_model: Path, wikitext: Path, tmp_path: Path, script: Any) -> None:
    settings_file = tmp_path / "wikitext.yaml"
    settings_file.write_text("config: tiny-v1\nwikitext: detokenised\nstride: 16\n")
    done = script(
        "perplexity.py", f"a={tiny_model}", "--dataset", wikitext, "--settings", settings_file,
        "--wikitext", "raw", "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out/a.perplexity.json").read_text())
    assert result["settings"]["text"] == "tiny-v1 test raw"
    assert (result["settings"]["stride"], result["model"]["name"]) == (16, "a")
    assert done.stdout == (tmp_path / "out/perplexity.md").read_text()
    assert f"{result['perplexity']['token_perplexity']:,.3f}" in done.stdout


def test_bad_input(tiny_model: Path, text_file: Path, wikitext: Path, tmp_path: Path) -> None:
    model, text = str(tiny_model), str(text_file)
    mirror = ["--dataset", str(wikitext), "--config", "tiny-v1"]
    unknown = tmp_path / "bad.yaml"
    unknown.write_text("strid: 4\n")
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    long = tmp_path / "long.txt"
    long.write_text("zzzzzzzz and so on")
    cases = [
        ([model], "give either --text or --dataset"),
        ([model, "--text", text, *mirror], "give either --text or --dataset"),
        ([model, "--text", str(tmp_path / "no.txt")], "--text .*no.txt does not exist"),
        ([model, "--text", text, "--stride", "0"], "--stride must be at least 1, got 0"),
        ([model, "--text", text, "--stride", "513"], "--stride must be between 1 and the window"),
        ([model, "--text", text, "--max-length", "513"], "--max-length 513: tiny has 512"),
        ([model, "--text", str(long), "--limit-tokens", "1"], "--limit-tokens 1: the first word"),
        ([model, "--text", text, "--wikitext", "raw"], "--wikitext is for --dataset"),
        ([model, "--text", str(blank)], "has no tokens"),
        ([model, *mirror, "--split", "train"], "--split train: .* has test"),
        ([model, "--text", text, "--settings", str(unknown)], "strid: .* did you mean 'stride'"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            perplexity.main([*arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(model: Any) -> None:
    import copy

    import torch

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.wpe.weight[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        perplexity.score_stream(broken, [0, 1, 2], [False, True, True], max_length=8, stride=8)


def test_a_word_perplexity_beyond_a_double_is_null() -> None:
    numbers = perplexity.summary(nll=10_000.0, tokens=100, words=1, bytes_=50, documents=1)
    assert numbers["word_perplexity"] is None
    assert numbers["token_perplexity"] == pytest.approx(math.exp(100))
