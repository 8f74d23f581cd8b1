"""Log-likelihoods of the shared scorer against HFLM's, and what it does with memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eval.answers import Answers, digest
from eval.model_folder import open_folders
from eval.scorer import Scorer
from tests.eval.conftest import sentence


def open_tiny(folder: Path, scorer: str, batch_size: int = 4) -> Any:
    from eval.harness import open_model

    (opened,) = open_folders([str(folder)])
    return open_model(opened, device="cpu", dtype="auto", batch_size=batch_size, scorer=scorer)


def instances() -> list[Any]:
    """A prompt for many questions, questions of several answers, of one token and of many, twice
    the same one, and contexts of one and many times the model's length."""
    prompt = " ".join(sentence(n) for n in range(8))
    pairs = []
    for number in range(6):
        question = f"{prompt} {sentence(40 + number)} Then the"
        pairs += [(question, " " + sentence(60 + number + answer)) for answer in range(3)]
        pairs += [(question, ending) for ending in (" apple", " river", " apple stone", " apple")]
    for number in range(4):
        long = " ".join(sentence(n) for n in range(number, number + 20 + 10 * number))
        pairs += [(long, " " + sentence(number + answer)) for answer in range(2)]
    pairs += [("The", " apple"), ("", "The river")]
    return [SimpleNamespace(args=pair, task_name=f"task{n % 2}") for n, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def stock_answers(tiny_model: Path) -> list[tuple[float, bool]]:
    from lm_eval.models.huggingface import HFLM

    plain = HFLM(pretrained=str(tiny_model), device="cpu", batch_size=3)
    return plain.loglikelihood(instances(), disable_tqdm=True)


def assert_close(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    values, first = zip(*got)
    others, others_first = zip(*expected)
    # Last bits of a float32 sum.
    np.testing.assert_allclose(values, others, rtol=5e-7, atol=5e-6)
    assert first == others_first


@pytest.mark.parametrize("batch_size", [1, 5])
def test_same_as_hflm(
    tiny_model: Path, batch_size: int, stock_answers: list[tuple[float, bool]]
) -> None:
    model = open_tiny(tiny_model, "shared", batch_size)
    assert_close(model.loglikelihood(instances()), stock_answers)
    assert dict(model.requests) == {"task0": 26, "task1": 26}
    assert 0 < sum(model.truncated.values()) < 52


def test_the_stock_scorer_is_hflm_to_the_last_bit(
    tiny_model: Path, stock_answers: list[tuple[float, bool]]
) -> None:
    assert open_tiny(tiny_model, "stock", 3).loglikelihood(instances()) == stock_answers


def test_own_model_class(own_folder: Path, stock_answers: list[tuple[float, bool]]) -> None:
    model = open_tiny(own_folder, "auto")
    assert model.scorer is not None
    assert_close(model.loglikelihood(instances()), stock_answers)


def test_less_is_computed(tiny_model: Path) -> None:
    model = open_tiny(tiny_model, "shared")
    requests = model.tokens(instances())
    windows, index = model.scorer.windows(requests)
    assert len(index) == len(requests) and len(windows) < len(requests)
    assert index[3] == index[4] == index[6], "answers of one token have one input"
    asked = sum(min(512, len(context) + len(answer) - 1) for context, answer in requests)
    assert sum(row.length for row in model.scorer.plan(windows)) < asked / 2


def test_too_little_memory_halves_the_batch(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    stock_answers: list[tuple[float, bool]],
) -> None:  # fmt: skip
    model = open_tiny(tiny_model, "shared", 8)
    compute = Scorer._log_probabilities

    def small(self: Scorer, batch: Any, windows: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, batch, windows)

    monkeypatch.setattr(Scorer, "_log_probabilities", small)
    assert_close(model.loglikelihood(instances()), stock_answers)
    assert "out of memory: 2,048 tokens at a time" in capsys.readouterr().err


def test_answers_are_taken_up_where_they_stopped(tiny_model: Path, tmp_path: Path) -> None:
    """Killed in the middle: what is on disk is not computed again, the rest is, no value moves."""
    model = open_tiny(tiny_model, "shared", 1)
    requests = model.tokens(instances())
    whole = Answers(len(requests), digest(requests))
    model.scorer.answer(requests, whole)

    class Killed(Exception):
        pass

    def stop(answered: int, tokens: int) -> None:
        if half.done.sum() > len(requests) // 2:
            half.save(now=True)
            raise Killed

    half = Answers(len(requests), digest(requests), tmp_path / "task.answers.npz")
    with pytest.raises(Killed):
        model.scorer.answer(requests, half, stop)
    again = Answers(len(requests), digest(requests), tmp_path / "task.answers.npz")
    assert 0 < again.done.sum() < len(requests)
    kept = again.done.copy()
    counted = []
    model.scorer.answer(requests, again, lambda answered, tokens: counted.append(answered))
    assert sum(counted) == (~kept).sum()
    assert_close(again.as_list(), whole.as_list())
    assert (again.loglikelihood[kept] == half.loglikelihood[kept]).all()


def test_answers_to_other_requests_are_left_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "task.answers.npz"
    kept = Answers(2, digest([([1], [2]), ([1], [3])]), path)
    kept.put(0, -1.5, True)
    kept.save(now=True)
    assert Answers(2, kept.requests_sha256, path).done.tolist() == [True, False]
    assert not Answers(2, digest([([1, 2], []), ([1], [3])]), path).done.any()
    assert "requests have changed" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:40])
    assert not Answers(2, kept.requests_sha256, path).done.any()
    assert "is broken" in capsys.readouterr().err
