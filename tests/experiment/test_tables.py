"""Tables of an experiment: the golden file, the tidy CSV, and the papers' numbers."""

import csv
import io
import math
from pathlib import Path

import pytest

from sparse_gpt.experiment import published
from sparse_gpt.experiment.arms import comparisons
from sparse_gpt.experiment.page import made_tables, tables_markdown
from sparse_gpt.experiment.paper_tables import finetuning, paper_tables
from sparse_gpt.experiment.results import read
from sparse_gpt.experiment.table import Cell, Table, markdown, to_html
from sparse_gpt.experiment.tables import arm_tables, count_cell, ranges, runs_csv
from tests.experiment import synthetic

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "experiment_tables.md"


def columns(table: Table, *names: str) -> list[tuple[str, ...]]:
    places = [list(table.header).index(name) for name in names]
    return [tuple(row[place].text for place in places) for row in table.rows]


def test_the_tables_of_an_experiment_are_the_golden_ones(tmp_path):
    """After a wanted change copy the `tables.md` that the page of `synthetic.iso_flop` writes."""
    results = read(synthetic.iso_flop(tmp_path / "iso_flop"))
    found = comparisons(results)
    text = tables_markdown(results, found, made_tables(results, found))
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_csv_has_one_line_a_run_and_reads_back(tmp_path):
    results = read(synthetic.spdf(tmp_path / "spdf"))
    rows = list(csv.DictReader(io.StringIO(runs_csv(results))))
    assert len(rows) == len(results.records) == 24
    row = next(r for r in rows if r["run"] == "wide75-s2-finetune-dense")
    record = next(r for r in results.records if r.run == "wide75-s2-finetune-dense")
    assert (row["stage"], row["mode"], row["seed"]) == ("finetune", "dense", "2")
    assert float(row["test_loss"]) == record.final_loss("test")
    assert float(row["test_perplexity"]) == pytest.approx(math.exp(float(row["test_loss"])))
    assert row["lr"] == "0.0003" and row["transformation"] == "Sparse Wide"


def test_the_csv_holds_no_formulas(tmp_path):
    tree = synthetic.record("dense", 1, 4.0, label="=HYPERLINK(1)")
    (row,) = csv.DictReader(io.StringIO(runs_csv(read(synthetic.write(tmp_path / "x", [tree])))))
    assert row["label"] == "'=HYPERLINK(1)"


def test_texts_stay_texts_in_markdown_and_html():
    table = Table("t|<b>", ["a|b", "c"], [[Cell("<i>x</i> *y* `z`\n| 1 |"), Cell("2", 2.0)]])
    text = markdown(table)
    assert "<" not in text and len(text.splitlines()) == 5
    assert r"\| 1 \|" in text and r"\*y\*" in text
    assert "<i>" not in to_html(table, "x") and "&lt;i&gt;" in to_html(table, "x")


def test_seeds_and_counts_are_short():
    assert ranges([3, 1, 2, 7]) == "1-3, 7"
    assert ranges([5]) == "5"
    assert [count_cell(n).text for n in (None, 12, 3_670_016, 2.5e9)] == [
        "-", "12", "3.67 M", "2.5 B",
    ]  # fmt: skip


def test_other_groups_stand_apart_and_are_not_compared(tmp_path):
    records = [synthetic.record("dense", seed, 4.0) for seed in (1, 2)]
    records += [synthetic.record("dense_hot", 1, 5.0, group="lr", label="lr 1e-2")]
    results = read(synthetic.write(tmp_path / "x", records))
    main, apart = arm_tables(results, [])
    assert columns(main, "arm") == [("dense",)]
    assert apart.title == "Arms, group lr (not compared)"
    assert columns(apart, "arm", "seeds") == [("lr 1e-2", "1 (1)")]


def test_a_group_that_others_are_compared_with_is_not_called_uncompared(tmp_path):
    records = [synthetic.record("dense", seed, 4.0 + seed / 10) for seed in (1, 2, 3)]
    records += [synthetic.record("wide75", seed, 3.8 + seed / 11) for seed in (1, 2, 3)]
    records += [synthetic.record("more", seed, 3.9, group="control") for seed in (1, 2, 3)]
    about = {"title": "x", "baseline": "dense", "compare": [["wide75", "more"]]}
    results = read(synthetic.write(tmp_path / "x", records, about=about))
    assert arm_tables(results, comparisons(results))[1].title == "Arms, group control"


def test_published_flops_are_those_of_the_ledger():
    """FACTS: F of Table 17 to its printed digits, and its totals over 4,460 x 512 sequences."""
    for row in published.END_TO_END:
        assert row.flops == pytest.approx(row.flops_per_sequence * 4460 * 512, rel=2e-4)
        assert row.sequences == pytest.approx(4460 * 512, rel=2e-3)


def test_published_averages_are_the_means_of_their_columns():
    for row in published.LEADERBOARD:
        assert row.average == pytest.approx(sum(row.scores.values()) / 5, abs=0.051)


def test_table_21_stands_beside_the_published_numbers(tmp_path):
    results = read(synthetic.spdf(tmp_path / "spdf"))
    (table,) = [t for t in paper_tables(results) if "Table 21" in t.title]
    assert columns(table, "sparsity", "fine-tuning", "published") == [
        ("0%", "dense", "15.9"),
        ("50%", "dense", "15.1"),
        ("50%", "sparse", "15.6"),
        ("75%", "dense", "14.6"),
        ("75%", "sparse", "16.0"),
    ]
    assert all(t.notes[0].startswith("Not comparable: ") for t in paper_tables(results))
    changed = finetuning(results)
    assert changed is not None
    assert columns(changed, "optimizer", "of them never active")[0] == (
        "fresh AdamW, zero moments", "900",
    )  # fmt: skip


def test_table_15_is_in_percent_with_the_published_rows(tmp_path):
    one = synthetic.leaderboard("dense", 1, 0.25, sparsity=0.0)
    many = [synthetic.leaderboard("wide75", s, 0.25 + s / 100, sparsity=0.75) for s in (1, 2, 3)]
    results = read(synthetic.write(tmp_path / "x", [one, *many]))
    (table,) = paper_tables(results)
    assert columns(table, "model", "seeds", "ARC", "average") == [
        ("dense", "1 (1)", "25.0 ± 1.2 s.e.", "25.0 ± 0.5 s.e."),
        ("wide75", "3 (1-3)", "27.0 ± 1.0", "27.0 ± 1.0"),
        ("published", "1", "20.8", "33.8"),
        ("published", "1", "20.6", "34.1"),
        ("published", "1", "22.1", "34.7"),
    ]


def test_table_17_counts_sequences_and_keeps_both_perplexities(tmp_path):
    trees = [synthetic.record("dense", s, 3.0 + s / 100) for s in (1, 2)]
    for tree in trees:
        tree["word_perplexity"] = {"test": 100.0 + tree["seed"]}
    results = read(synthetic.write(tmp_path / "x", trees))
    (table,) = [t for t in paper_tables(results) if "Table 17" in t.title]
    mean = (math.exp(3.01) + math.exp(3.02)) / 2
    row = columns(table, "sequences", "total FLOPs", "perplexity a token", "perplexity a word")[0]
    assert row == ("15,625", "1.0000e+13", f"{mean:.2f} ± 0.14", "101.50 ± 0.71")
    assert [name for name, *_ in columns(table, "model")][1:] == [
        "published: GPT-3 Small", "published: GPT-3 Small", "published: GPT-3 Medium",
    ]  # fmt: skip
