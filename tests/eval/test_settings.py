"""Options from a YAML file: typed as flags are, overruled by flags, refused where unknown."""

from pathlib import Path

import pytest

from eval import leaderboard, local_task, perplexity, settings
from sparse_gpt.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "eval"


def test_the_file_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("batch-size: 3\ntasks: [arc, mmlu]\nout: some/where\nlimit: null\n")
    parse = settings.parse
    options = parse(leaderboard.build_parser(), ["folder", "--settings", str(path)])
    assert (options.batch_size, options.tasks) == (3, ["arc", "mmlu"])
    assert options.out == Path("some/where") and options.limit is None
    flags = ["folder", "--settings", str(path), "--batch-size", "auto", "--tasks", "arc"]
    options = parse(leaderboard.build_parser(), flags)
    assert (options.batch_size, options.tasks) == ("auto", ["arc"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shot: zero", "shot: unknown key; did you mean 'shots'"),
        ("shots: none", "'none' is none of leaderboard, zero"),
        ("limit: many", "limit: invalid literal"),
        ("limit: [1, 2]", "limit: expected one value, got a list"),
        ("limit: 1\nlimit: 2", "given twice"),
        ("folders: [x]", "folders: unknown key"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        settings.parse(leaderboard.build_parser(), ["folder", "--settings", str(path)])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"not found: nowhere.yaml"):
        settings.parse(local_task.build_parser(), ["folder", "--settings", "nowhere.yaml"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_parse(path: Path) -> None:
    of_perplexity = path.stem.startswith("wikitext")
    parser = (perplexity if of_perplexity else leaderboard).build_parser()
    options = settings.parse(parser, ["folder", "--settings", str(path)])
    assert options.out.parts[0] == "runs"


def test_shipped_files_are_found() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"leaderboard", "wikitext103"}
