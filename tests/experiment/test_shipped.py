"""The experiments that come with the project: they load, plan, and cost what the papers say."""

from pathlib import Path

import pytest

from sparse_gpt.experiment.plan import Planner, Run
from sparse_gpt.experiment.spec import load_experiment
from tests.ranks import ROOT

SEQUENCES = 4460 * 512


def runs(file: str, work: Path, monkeypatch) -> dict[str, Run]:
    """The arms' runs of the first seed."""
    monkeypatch.chdir(ROOT)
    planned = Planner(load_experiment(f"configs/experiments/{file}.yaml"), work).runs()
    assert len({run.name for run in planned}) == len(planned)
    return {run.arm: run for run in planned if run.seed == 1}


def test_table17_costs_what_it_printed(tmp_path, monkeypatch):
    arms = runs("table17", tmp_path, monkeypatch)
    per_sequence = {arm: arms[arm].plan.flops_per_sequence for arm in ("dense", "wide50", "medium")}
    assert per_sequence == {
        "dense": 876_303_876_096,
        "wide50": 1_029_007_761_408,
        "medium": 2_484_477_100_032,
    }
    assert arms["wide75"].plan.flops_per_sequence == 1_229_410_271_232
    assert arms["dense"].plan.flops_total == SEQUENCES * 876_303_876_096
    for run in arms.values():
        config, wanted = run.config, 6e-4 if run.group == "main" else run.config.optimizer.lr
        assert (config.batch(8), config.seq_len, config.optimizer.lr) == (512, 1024, wanted)
        assert config.model.dropout == 0.1 and config.optimizer.weight_decay == 0.1
        assert run.plan.steps == 4460 or run.arm == "dense_tokens"
    wide = arms["wide50"].config
    assert (wide.sparsity.algorithm, wide.sparsity.update.freq) == ("rigl", 500)
    assert wide.update_stop(8) == 3568
    assert arms["wide50"].plan.topology_updates == 7
    assert arms["wide50"].ratio_model == pytest.approx(1.1743, abs=1e-3)
    for control in ("dense_tokens", "dense_wide"):
        match = arms[control].match
        assert match is not None and match.target == arms["wide50"].plan.flops_total
        assert abs(match.residual) < 2e-4
    assert arms["model50"].ratio_model == pytest.approx(1, abs=1e-6)
    grid = {8e-3, 6e-3, 5.4e-3, 1.8e-3, 6e-4, 2e-4, 6e-5}
    for arm in ("dense", "wide50", "medium"):
        tried = {r.config.optimizer.lr for name, r in arms.items() if name.startswith(f"{arm}_lr")}
        assert tried | {arms[arm].config.optimizer.lr} == grid


@pytest.mark.parametrize("file", ["table15", "table21"])
def test_the_pile_recipe(file, tmp_path, monkeypatch):
    arms = runs(file, tmp_path, monkeypatch)
    for run in (arms[arm] for arm in ("dense", "wide50", "wide75")):
        config, plan = run.config, run.plan
        assert (plan.steps, plan.tokens, plan.warmup_steps) == (4778, 2_505_048_064, 716)
        assert (config.optimizer.lr, config.optimizer.betas) == (6e-4, (0.9, 0.95))
        assert plan.model.vocab_size == 50257
    assert [arms[arm].plan.model.d_model for arm in ("dense", "wide50", "wide75")] == [
        768,
        1092,
        1536,
    ]
    wide = arms["wide75"].config
    assert (wide.sparsity.algorithm, wide.sparsity.update.freq, wide.update_stop(8)) == (
        *("set", 100),
        3584,
    )


def test_small_iso_flop_is_iso_flop(tmp_path, monkeypatch):
    arms = runs("small/iso_flop", tmp_path, monkeypatch)
    tokens = {run.plan.tokens for run in arms.values() if run.arm != "dense_tokens"}
    assert len(tokens) == 1
    for arm in ("static75", "set75", "rigl75", "set50", "rigl50"):
        assert arms[arm].ratio_layers == pytest.approx(1, abs=0.01)
    for arm in ("model75", "model75_project"):
        assert arms[arm].ratio_model == pytest.approx(1, abs=1e-5)
    for arm in ("dense_tokens", "dense_wide"):
        assert arms[arm].ratio_model == pytest.approx(arms["set75"].ratio_model, rel=2e-3)
    assert arms["wide_projection"].plan.model.d_embed == arms["set75"].plan.model.d_model


def test_small_block_shapes_differ_in_the_shape_alone(tmp_path, monkeypatch):
    arms = runs("small/block_shape", tmp_path, monkeypatch)
    flops = {run.plan.flops_total for run in arms.values() if run.group == "main"}
    assert len(flops) == 1
    assert arms["n2m4"].plan.model.d_model == arms["unstructured50"].plan.model.d_model
    shapes = {run.config.sparsity.structure for run in arms.values() if run.group == "main"}
    assert len(shapes) == 12  # and SMET with one of them
