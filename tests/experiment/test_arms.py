"""Arms, comparisons, the verdict's sentences and the warnings."""

import pytest
from scipy import stats

from sparse_gpt.experiment.arms import arms, comparisons
from sparse_gpt.experiment.checks import warnings
from sparse_gpt.experiment.results import read
from sparse_gpt.experiment.special_plots import lr_sweeps, shape_table, speeds
from sparse_gpt.experiment.verdict import answer, sentence
from tests.experiment import synthetic
from tests.experiment.synthetic import record


def results_of(folder, records, **parts):
    return read(synthetic.write(folder, records, **parts))


def test_comparisons_are_on_common_seeds_and_corrected_together(tmp_path):
    dense = {1: 4.00, 2: 4.02, 3: 4.01, 4: 4.03}
    wide = {1: 3.90, 2: 3.93, 3: 3.90, 9: 1.0}
    slow = {1: 4.01, 2: 4.02, 3: 4.03}
    records = [record("dense", s, loss) for s, loss in dense.items()]
    records += [record("wide", s, loss, sparsity=0.75) for s, loss in wide.items()]
    records += [record("slow", s, loss, flops=2e13) for s, loss in slow.items()]
    first, second = comparisons(results_of(tmp_path / "x", records))
    seeds = (1, 2, 3)
    p = [
        float(stats.ttest_rel([a[s] for s in seeds], [dense[s] for s in seeds]).pvalue)
        for a in (wide, slow)
    ]
    assert {first.arm.name, second.arm.name} == {"wide", "slow"}
    by_name = {c.arm.name: c for c in (first, second)}
    assert by_name["wide"].pairs.seeds == seeds
    assert by_name["wide"].p_adjusted == pytest.approx(min(1, 2 * p[0]))
    assert by_name["slow"].p_adjusted == pytest.approx(max(2 * p[0], p[1]))
    assert by_name["wide"].verdict == "better" and by_name["slow"].verdict == "undecided"
    assert by_name["wide"].equal_flops and by_name["slow"].flops_ratio == 2.0


def test_named_pairs_replace_the_default_ones(tmp_path):
    records = [record(name, s, 4.0 + s / 9) for name in ("dense", "a", "b") for s in (1, 2)]
    about = {"baseline": "dense", "compare": [["a", "b"], ["a", "not_there"]]}
    found = comparisons(results_of(tmp_path / "x", records, about=about))
    assert [(c.arm.name, c.against.name) for c in found] == [("a", "b")]


def test_an_arm_meets_those_given_its_flops_by_default(tmp_path):
    records = [record(name, s, 4.0 + s / 9) for name in ("dense", "wide", "longer") for s in (1, 2)]
    for tree in records[4:]:
        tree["match"] = {"arm": "wide", "by": "tokens", "settings": {"max_steps": 160}}
    found = comparisons(results_of(tmp_path / "x", records))
    pairs = {(c.arm.name, c.against.name) for c in found}
    assert pairs == {("wide", "dense"), ("longer", "dense"), ("wide", "longer")}
    assert len(found) == 3


def test_fine_tuned_arms_meet_the_baseline_and_their_own_other_mode(tmp_path):
    results = read(synthetic.spdf(tmp_path / "spdf"))
    pairs = [
        (c.arm.name, c.arm.mode, c.against.name, c.against.mode)
        for c in comparisons(results)
        if c.arm.stage == "finetune"
    ]
    assert pairs == [
        ("wide50", "dense", "dense", "dense"),
        ("wide50", "dense", "wide50", "sparse"),
        ("wide50", "sparse", "dense", "dense"),
        ("wide75", "dense", "dense", "dense"),
        ("wide75", "dense", "wide75", "sparse"),
        ("wide75", "sparse", "dense", "dense"),
    ]


def test_losses_are_reported_with_the_wins(tmp_path):
    records = [record("dense", s, 4.0 + s / 100) for s in (1, 2, 3)]
    records += [record("wide", s, 4.3 + s / 99, sparsity=0.5) for s in (1, 2, 3)]
    results = results_of(tmp_path / "x", records)
    (comparison,) = comparisons(results)
    assert comparison.verdict == "worse"
    assert "“wide” (+0.3002) has a higher loss than “dense”" in answer(results, [comparison])[0]
    text = sentence(comparison)
    assert text.startswith(
        "wide: test loss higher than dense by 0.3002 nats (95 % interval 0.3000 to 0.3005, "
    )
    assert text.endswith("3 pairs, adjusted p < 0.0001), at equal FLOPs and equal tokens.")


def test_a_diverged_run_is_named_and_left_out(tmp_path):
    records = [record("dense", s, 4.0) for s in (1, 2)]
    records[1]["loss"] = {"val": float("nan"), "test": None}
    results = results_of(tmp_path / "x", records)
    (arm,) = arms(results, "pretrain")
    assert arm.diverged() == [2] and arm.losses("test") == {1: 4.0}
    assert any("dense has no finite loss with seed 2" in text for text in warnings(results))


def test_an_arm_that_diverged_does_not_move_the_others_to_another_split(tmp_path):
    records = [record(name, s, 4.0 + s / 9) for name in ("dense", "a", "lost") for s in (1, 2)]
    for tree in records[4:]:
        tree["loss"] = {"val": None, "test": None}
    (comparison,) = comparisons(results_of(tmp_path / "x", records))
    assert (comparison.arm.name, comparison.split) == ("a", "test")
    del records[2]["loss"]["test"], records[3]["loss"]["test"]
    (comparison,) = comparisons(results_of(tmp_path / "y", records))
    assert comparison.split == "val"


def test_unequal_conditions_are_warned_of(tmp_path):
    records = [record("dense", s, 4.0) for s in (1, 2)]
    records += [record("wide", s, 4.0, sparsity=0.75) for s in (1, 2)]
    records[1]["config"]["optimizer"] = {"lr": 1e-3}
    records[2]["config"]["seq_len"] = records[3]["config"]["seq_len"] = 256
    records[3]["data"]["novels"]["vocab_size"] = 4096
    records[3]["git"] = {"revision": "f" * 40, "dirty": True}
    records[0]["device"] = "H200"
    found = " ".join(warnings(results_of(tmp_path / "x", records)))
    assert "The seeds of dense differ in more than the seed: optimizer.lr." in found
    assert "wide differs from dense in keys that are not among its settings: seq_len." in found
    assert "saw different data or tokenizers (wide-s2 unlike the others)" in found
    assert "more than one git revision" in found and "more than one device" in found
    assert "uncommitted changes: wide-s2" in found


def test_equal_conditions_give_no_warning(tmp_path):
    assert warnings(read(synthetic.iso_flop(tmp_path / "a"))) == []
    assert warnings(read(synthetic.block_shape(tmp_path / "b"))) == []
    assert warnings(read(synthetic.spdf(tmp_path / "c"))) == []


def test_a_given_budget_is_no_unplanned_difference(tmp_path):
    records = [record("dense", 1, 4.0), record("longer", 1, 3.9)]
    records[0]["config"]["max_steps"], records[1]["config"]["max_steps"] = 100, 160
    assert any("max_steps" in text for text in warnings(results_of(tmp_path / "a", records)))
    records[1]["match"] = {"arm": "wide", "by": "tokens", "settings": {"max_steps": 160}}
    assert warnings(results_of(tmp_path / "b", records)) == []


def test_a_grid_whose_best_is_at_its_edge_is_said(tmp_path):
    grid = {"1e-3": 3.0, "1e-4": 3.5}
    records = [record("dense", 1, 4.0, experiment="spdf")]
    records.append(synthetic.finetuned("dense", 1, "dense", 3.0, sparsity=0.0, grid=grid))
    found = warnings(results_of(tmp_path / "x", records))
    assert found == [
        "The best learning rate is the highest of the grid in dense-s1-finetune-dense; "
        "one outside may be better."
    ]


def test_shapes_stand_beside_their_speed(tmp_path):
    results = read(synthetic.block_shape(tmp_path / "x"))
    table = shape_table(results)
    assert table is not None
    by_shape = {row[1].text: [each.text for each in row[-2:]] for row in table.rows}
    measured = speeds().ratios["16x16", 0.75]
    assert table.header[-2:] == ["time over dense, bf16", "time over dense, fp32"]
    assert by_shape["16x16"] == [f"{measured['bf16']:.2f}", f"{measured['fp32']:.2f}"]
    assert by_shape["1:4"] == by_shape["2:8 transposable"] == ["-", "-"]
    missing = shape_table(results, tmp_path / "none.json")
    assert missing is not None and {row[-1].text for row in missing.rows} == {"-"}
    assert shape_table(read(synthetic.iso_flop(tmp_path / "y"))) is None


def test_arms_that_differ_in_lr_alone_make_a_line(tmp_path):
    records = [record("dense", s, 4.0 + s) for s in (1, 2)]
    for rate in (1e-3, 1e-2):
        tree = record(f"dense_{rate:g}", 1, 4.5, group="lr")
        tree["settings"] = {"optimizer.lr": rate}
        tree["config"]["optimizer"] = {"lr": rate}
        records.append(tree)
    records.append(record("wide", 1, 4.0, sparsity=0.75))
    assert lr_sweeps(results_of(tmp_path / "x", records)) == {
        "dense": {
            1e-3: [pytest.approx(4.55)],
            3e-3: [pytest.approx(5.05), pytest.approx(6.05)],
            1e-2: [pytest.approx(4.55)],
        }
    }


def test_named_pairs_are_compared_in_every_group_and_across(tmp_path):
    records = [record("dense", s, 4.0 + s / 9) for s in (1, 2)]
    records += [record(name, s, 3.9 + s / 8, group="half") for name in ("a", "b") for s in (1, 2)]
    about = {"baseline": "dense", "compare": [["a", "b"], ["a", "dense"]]}
    found = comparisons(results_of(tmp_path / "x", records, about=about))
    assert [(c.arm.name, c.against.name) for c in found] == [("a", "b"), ("a", "dense")]
    assert comparisons(results_of(tmp_path / "y", records)) == []  # by default those of main


def test_records_of_other_runs_than_planned_are_left_out(tmp_path):
    records = [record("dense", s, 4.0 + s) for s in (1, 2, 3)]
    keys = ("run", "arm", "label", "seed", "stage", "group")
    plan = [{key: tree[key] for key in keys} for tree in records[:2]]
    plan[1]["stale"] = "optimizer.lr: 0.002 -> 0.004"
    results = results_of(tmp_path / "x", records, plan=plan)
    (arm,) = arms(results, "pretrain")
    assert arm.losses("test") == {1: 5.0}
    said = " ".join(warnings(results))
    assert "dense-s2.json: of another run than planned: optimizer.lr: 0.002 -> 0.004" in said
    assert "dense-s3.json: not in the plan" in said
    assert [run.run for run in results.missing] == ["dense-s2"]
