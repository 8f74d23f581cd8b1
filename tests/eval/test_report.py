"""Tables from result files: layout, arithmetic of differences, refusal of other files."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import leaderboard_report, report
from sparse_gpt.errors import UserError


def leaderboard_result(name: str, scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    tasks = {
        key: {"score": score, "stderr": 0.03, "truncated_share": 0.25}
        for key, score in scores.items()
    }
    mean = {"score": sum(scores.values()) / len(scores), "stderr": 0.01}
    return {
        "kind": "leaderboard",
        "schema": 1,
        "model": {"name": name, "sparse_gpt": None},
        "settings": {"shots": "leaderboard"},
        "tasks": tasks,
        "average": mean if len(scores) == 5 else None,
        "notes": [],
        **changes,
    }


DENSE = dict(zip(leaderboard_report.COLUMNS, (0.208, 0.272, 0.470, 0.246, 0.494)))
SPARSE = dict(zip(leaderboard_report.COLUMNS, (0.221, 0.278, 0.475, 0.256, 0.504)))


def cells(table: str, start: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_leaderboard_table_has_the_shape_of_table_15() -> None:
    metadata = {
        "sparsity": 0.74996,
        "config": {
            "ift": {"member": "wide", "iso_flop": "model"},
            "sparsity": {"algorithm": "set"},
        },
    }
    sparse = leaderboard_result("sw75", SPARSE)
    sparse["model"]["sparse_gpt"] = metadata
    dense = leaderboard_result("dense", DENSE, notes=["only the first 20 documents"])
    dense["model"]["sparse_gpt"] = {"sparsity": 0.0, "config": {}}
    table = report.tables([dense, sparse])
    scores, rest = table.split("Difference to dense, in points")
    differences, rest = rest.split("Requests truncated on the left")
    assert cells(scores, "Model")[5:] == [*leaderboard_report.COLUMNS.values(), "Average"]
    assert cells(scores, "dense") == [
        "dense", "dense", "0.0%", "-", "leaderboard", "20.8 ± 3.0", "27.2 ± 3.0", "47.0 ± 3.0",
        "24.6 ± 3.0", "49.4 ± 3.0", "33.8 ± 1.0",
    ]  # fmt: skip
    assert cells(scores, "sw75")[1:4] == ["sparse wide (iso-FLOP whole run)", "75.0%", "set"]
    assert "Without p: results on other documents, or without outcomes" in differences
    assert cells(differences, "sw75")[1:] == [
        "+1.3 ± 4.2", "+0.6 ± 4.2", "+0.5 ± 4.2", "+1.0 ± 4.2", "+1.0 ± 4.2", "+0.9 ± 1.4",
    ]  # fmt: skip
    assert cells(differences, "  p")[1:] == ["-"] * 6
    assert cells(rest, "sw75")[1:] == ["25.0"] * 5
    assert rest.rstrip().endswith("- only the first 20 documents (dense)")


def test_a_subset_has_dashes_and_no_average() -> None:
    part = leaderboard_result("part", {"arc": 0.2})
    part["tasks"]["arc"]["stderr"] = None
    row = cells(report.tables([part]).split("Requests")[0], "part")
    assert row == ["part", "-", "-", "-", "leaderboard", "20.0", "-", "-", "-", "-", "-"]


def perplexity_result(name: str, word_perplexity: float | None) -> dict[str, Any]:
    return {
        "kind": "perplexity",
        "schema": 1,
        "model": {"name": name},
        "settings": {"text": "test", "max_length": 1024, "stride": 512},
        "perplexity": {
            "tokens": 1000,
            "token_perplexity": 20.8,
            "word_perplexity": word_perplexity,
            "bits_per_byte": 1.01,
        },
        "notes": [],
    }


def test_the_perplexity_table_compares_with_the_first() -> None:
    results = [perplexity_result("a", 40.0), perplexity_result("b", 36.0)]
    results.append(perplexity_result("c", None))
    table = report.tables(results)
    assert cells(table, "a")[-1] == "1.0000"
    assert cells(table, "b")[1:] == [
        "test", "1,000", "20.800", "36.000", "1.0100", "1024/512", "0.9000",
    ]  # fmt: skip
    assert cells(table, "c")[4] == "over 1e308" and cells(table, "c")[-1] == "-"


def test_files_are_written_whole_read_back_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = leaderboard_result("dense", DENSE)
    other = perplexity_result("dense", 40.0)
    paths = [report.write_result(tmp_path / "out", "dense", made) for made in (result, other)]
    assert [path.name for path in paths] == ["dense.leaderboard.json", "dense.perplexity.json"]
    assert report.read_result(paths[0]) == result
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [p.name for p in paths]
    report.main([str(path) for path in paths])
    assert capsys.readouterr().out.strip() == report.tables([result, other])
    with pytest.raises(ValueError, match="Out of range float"):
        report.write_result(tmp_path, "bad", {**other, "seconds": float("nan")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read result file"),
        ('{"kind": "recipe"}', "is no result of"),
        (json.dumps({**perplexity_result("a", 1.0), "schema": 2}), "result schema 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        report.read_result(path)
