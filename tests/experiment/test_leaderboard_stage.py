"""The leaderboard as a stage: what it asks for; a run's way from checkpoint to record."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_gpt.config_file import validate
from sparse_gpt.errors import UserError
from sparse_gpt.experiment import leaderboard_stage
from sparse_gpt.experiment.leaderboard_stage import LeaderboardStage, evaluate
from sparse_gpt.experiment.results import Leaderboard
from tests.eval.conftest import tiny_hub  # noqa: F401
from tests.hf.checkpoints import sparse_model, write_run, write_tokenizer


def stage(**keys: Any) -> LeaderboardStage:
    return validate(LeaderboardStage, keys, "stages")


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRRORS", "/mirrors")
    given = stage(data="$MIRRORS/hub", tasks=["arc", "mmlu"], limit=7, device="cpu").arguments()
    assert given == [
        "--shots", "leaderboard", "--device", "cpu", "--dtype", "auto", "--batch-size", "auto",
        "--data", "/mirrors/hub", "--tasks", "arc", "mmlu", "--limit", "7",
    ]  # fmt: skip
    assert stage(batch_size=4).arguments()[-2:] == ["--batch-size", "4"]
    with pytest.raises(UserError, match=r"leaderboard.data: \$NOWHERE/hub: a variable is not set"):
        stage(data="$NOWHERE/hub").arguments()
    with pytest.raises(UserError, match="shots"):
        stage(shots="many")


def test_the_options_are_those_of_the_command() -> None:
    from eval.leaderboard import build_parser

    parsed = build_parser().parse_args(["folder", *stage(limit=3, data="hub").arguments()])
    assert (parsed.limit, parsed.data, parsed.batch_size) == (3, Path("hub"), "auto")


def test_a_failed_evaluation_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('the data is broken'); sys.exit(3)")
    monkeypatch.setattr(leaderboard_stage, "SCRIPT", script)
    write_run(tmp_path / "run", sparse_model())
    with pytest.raises(UserError, match=r"ended with 3:\nthe data is broken"):
        evaluate(tmp_path / "run", "set75-s1", tmp_path / "out", stage())
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_from_checkpoint_to_record(
    tiny_hub: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    write_run(tmp_path / "run", sparse_model())
    write_tokenizer(tmp_path / "run")
    wanted = stage(shots="zero", tasks=["winogrande"], data=str(tiny_hub), device="cpu")
    first = evaluate(tmp_path / "run", "set75-s1", tmp_path / "out", wanted)
    assert Leaderboard.model_validate(first).tasks["winogrande"].score is not None
    assert json.loads(json.dumps(first)) == first
    # Again: exported anew to the same bytes, so what is finished is taken up.
    assert evaluate(tmp_path / "run", "set75-s1", tmp_path / "out", wanted) == first
    assert "1 of 1 lm-eval tasks are finished" in (tmp_path / "out" / "log.txt").read_text()
