"""A leaderboard run goes on where it stopped, and never mixes models, settings or data."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval import harness, leaderboard_tasks
from eval.leaderboard_run import evaluate_folders
from eval.model_folder import open_folders
from eval.scorer import Scorer
from tests.eval.conftest import _truthful, _write, make_model

pytestmark = [
    # As in test_leaderboard.py: no fork is used here.
    pytest.mark.filterwarnings(
        "ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"
    ),
]


def evaluate(model: Path, hub: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"shots": "zero", "device": "cpu", "batch_size": 2, **options}
    chosen = leaderboard_tasks.select(["truthfulqa", "winogrande"])
    (result,) = evaluate_folders(
        open_folders([f"model={model}"]), chosen, out=out, mirror=hub, **settings
    )
    return result


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


class Killed(Exception):
    pass


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts scored requests, and stops at `limit` of them."""
    counts = {"requests": 0, "limit": 1 << 30}
    answer = Scorer.answer

    def counting(self: Scorer, requests: Any, answers: Any, advance: Any) -> None:
        def told(answered: int, tokens: int) -> None:
            counts["requests"] += answered
            if counts["requests"] > counts["limit"]:
                answers.save(now=True)
                raise Killed
            advance(answered, tokens)

        self.budget = 60  # tokens, so that a task takes several batches
        answer(self, requests, answers, told)

    monkeypatch.setattr(Scorer, "answer", counting)
    return counts


def test_a_stopped_run_goes_on(
    tiny_model: Path, tiny_hub: Path, tmp_path: Path, scored: dict[str, int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = evaluate(tiny_model, tiny_hub, tmp_path / "whole")
    everything = scored["requests"]
    assert everything == sum(task["requests"] for task in whole["tasks"].values()) == 46
    assert "projected: " in capsys.readouterr().err

    # In the middle of the second task.
    scored.update(requests=0, limit=36)
    with pytest.raises(Killed):
        evaluate(tiny_model, tiny_hub, tmp_path / "half")
    (folder,) = (tmp_path / "half" / "model.leaderboard").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "run.json", "truthfulqa_mc2.answers.npz", "truthfulqa_mc2.json", "winogrande.answers.npz",
    ]  # fmt: skip
    assert not (tmp_path / "half" / "model.leaderboard.json").exists()
    done = scored["requests"]

    scored.update(requests=0, limit=1 << 30)
    capsys.readouterr()
    result = evaluate(tiny_model, tiny_hub, tmp_path / "half")
    assert "1 of 2 lm-eval tasks are finished" in capsys.readouterr().err
    assert scored["requests"] == everything - done > 0
    assert without_times(result) == without_times(whole)
    written = json.loads((tmp_path / "half" / "model.leaderboard.json").read_text())
    assert written == result

    # Finished: neither model nor data is opened.
    monkeypatch.setattr(harness, "open_model", None)
    monkeypatch.setattr(leaderboard_tasks, "load", None)
    assert (
        evaluate(tiny_model, tiny_hub, tmp_path / "half", batch_size=3)["tasks"]
        == (result["tasks"])
    )


def test_other_models_and_settings_have_their_own_folders(
    tiny_model: Path, tiny_hub: Path, tmp_path: Path, scored: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    first = evaluate(tiny_model, tiny_hub, out, limit=2)
    other = make_model(tmp_path / "other", seed=1)
    for changed in (
        lambda: evaluate(tiny_model, tiny_hub, out, limit=3),
        lambda: evaluate(tiny_model, tiny_hub, out, limit=2, dtype="bfloat16"),
        lambda: evaluate(other, tiny_hub, out, limit=2),
    ):
        scored["requests"] = 0
        capsys.readouterr()
        assert changed()["run_sha256"] != first["run_sha256"]
        assert scored["requests"] > 0
        assert "other weights, settings or versions than in" in capsys.readouterr().err
    assert len(list((out / "model.leaderboard").iterdir())) == 4


def test_changed_data_is_evaluated_again(
    tiny_model: Path, tiny_hub: Path, tmp_path: Path, scored: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub = tmp_path / "hub"
    shutil.copytree(tiny_hub, hub)
    before = evaluate(tiny_model, hub, tmp_path / "out")
    rows = [_truthful(number) for number in (3, 1)]
    _write(hub / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})
    scored["requests"] = 0
    after = evaluate(tiny_model, hub, tmp_path / "out")
    assert "truthfulqa_mc2: the data has changed" in capsys.readouterr().err
    assert scored["requests"] == 2 * 5
    assert after["tasks"]["winogrande"] == before["tasks"]["winogrande"]
    documents = [r["tasks"]["truthfulqa"]["outcomes"] for r in (before, after)]
    assert [len(outcome["values"]) for outcome in documents] == [6, 2]
    expected = [documents[0]["values"][place] for place in (3, 1)]
    assert documents[1]["values"] == pytest.approx(expected, abs=1e-6)


def test_outcomes_average_to_the_score(tiny_model: Path, tiny_hub: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_model, tiny_hub, tmp_path)
    assert result["settings"]["name"] == "leaderboard_v1_zero_shot"
    for task in result["tasks"].values():
        values = [float(value) for value in task["outcomes"]["values"]]
        assert sum(values) / len(values) == pytest.approx(task["score"], abs=1e-12)
    assert set(result["tasks"]["winogrande"]["outcomes"]["values"]) <= {"0", "1"}


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.utils

    from eval.templates import compiled_once

    compiled = []
    environment = lm_eval.utils.env
    from_string = environment.from_string

    def counting(source: str) -> Any:
        compiled.append(source)
        return from_string(source)

    monkeypatch.setattr(environment, "from_string", counting)
    with compiled_once():
        texts = [lm_eval.utils.apply_template("a {{n}}", {"n": number}) for number in range(3)]
        texts.append(lm_eval.utils.apply_template("b {{n}}", {"n": 3}))
    assert texts == ["a 0", "a 1", "a 2", "b 3"]
    assert compiled == ["a {{n}}", "b {{n}}"]
    assert lm_eval.utils.apply_template("a {{n}}", {"n": 4}) == "a 4"
    assert len(compiled) == 3
