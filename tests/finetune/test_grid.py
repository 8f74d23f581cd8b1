"""A grid of learning rates: what is chosen, tested, kept, and not done twice."""

import json
import shutil

import pytest

from sparse_gpt.config_file import read_tree, validate
from sparse_gpt.errors import UserError
from sparse_gpt.finetune.config import FinetuneConfig
from tests.finetune.runs import results_of, tune
from tests.ranks import run_ranks

# 1e30 diverges: the second step is not finite.
GRID = ("lr_grid=[2e-4, 2e-3, 1e30]", "optimizer={max_nonfinite_steps: 2}", "max_steps=4")


def tuned(corpus, out, checkpoint, *overrides):
    return run_ranks(1, tune, corpus, str(out), str(checkpoint), list(overrides))[0]


@pytest.fixture(scope="module")
def grid(corpus, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("grid") / "run"
    return run, tuned(corpus, run, pretrained.run, *GRID)["results"]


def load(path):
    return validate(FinetuneConfig, read_tree(path), str(path))


def of_lr(run, lr):
    return json.loads((run / f"lr-{lr}" / "results.json").read_text())


def test_the_lowest_validation_loss_is_chosen_and_tested(corpus, pretrained, grid, tmp_path):
    run, results = grid
    assert results == json.loads((run / "results.json").read_text())
    assert load(run / "finetune.yaml").lr_grid == (2e-4, 2e-3, 1e30)
    assert results["lr_grid"].keys() == {"0.0002", "0.002", "1e+30"}
    assert results["lr_grid"]["1e+30"] is None
    assert "non-finite" in of_lr(run, "1e+30")["diverged"]
    assert results["lr_grid"]["0.002"] < results["lr_grid"]["0.0002"]
    assert (results["lr"], results["run"], results["lr_at_edge"]) == (2e-3, "lr-0.002", False)
    alone = tuned(corpus, tmp_path / "alone", pretrained.run, "optimizer={lr: 2e-3}", "max_steps=4")
    for split in ("val", "test"):
        assert results[split] == alone["results"][split]
    assert results["lr_grid"]["0.002"] == alone["results"]["val"]["loss"]
    for lr in ("0.0002", "0.002"):
        assert "test" not in of_lr(run, lr)
        assert of_lr(run, lr)["val"]["loss"] == results["lr_grid"][lr]


def test_only_the_chosen_one_keeps_checkpoints(grid):
    run, _ = grid
    assert [path.parent.name for path in run.glob("*/checkpoints")] == ["lr-0.002"]


def test_what_is_done_is_not_done_again(corpus, pretrained, grid, tmp_path):
    """Stopped behind the first learning rates: only the others are trained."""
    run = tmp_path / "run"
    shutil.copytree(grid[0], run)
    (run / "results.json").unlink()
    files = [run / f"lr-{lr}" / "results.json" for lr in ("0.0002", "0.002", "1e+30")]
    written = [file.stat().st_mtime_ns for file in files]
    more = ("lr_grid=[2e-4, 2e-3, 1e30, 2.5e-3]", "keep_checkpoints=all")
    again = tuned(corpus, run, pretrained.run, *GRID, *more)
    assert [file.stat().st_mtime_ns for file in files] == written
    results = again["results"]
    assert results["lr_grid"].keys() - grid[1]["lr_grid"].keys() == {"0.0025"}
    assert results["lr_grid"].items() >= grid[1]["lr_grid"].items()
    assert (run / "lr-0.0025/checkpoints").exists() and (run / "lr-0.002/checkpoints").exists()


def test_another_configuration_in_the_same_folder(corpus, pretrained, grid, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grid[0], run)
    refused = tuned(corpus, run, pretrained.run, *GRID, "max_steps=5", "lr_grid=[2e-3]")
    assert "max_steps: 4 -> 5" in refused["error"]


def test_the_best_at_the_edge_is_said(corpus, pretrained, tmp_path):
    edge = ["lr_grid=[2e-4, 2e-3]", "optimizer={}", "max_steps=2"]
    run = str(tmp_path / "run")
    results, same = run_ranks(2, results_of, corpus, run, str(pretrained.run), edge)
    assert results == same == json.loads((tmp_path / "run/results.json").read_text())
    assert (results["lr"], results["lr_at_edge"]) == (2e-3, True)


def test_all_diverged(corpus, pretrained, tmp_path):
    refused = tuned(corpus, tmp_path / "run", pretrained.run, *GRID, "lr_grid=[1e30, 1e31]")
    assert "diverged at all of 1e+30, 1e+31; add lower ones" in refused["error"]


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"lr_grid": [1e-3], "optimizer": {"lr": 1e-3}}, "leave one of them out"),
        ({"lr_grid": [1e-3, 1e-3]}, "a learning rate is given twice"),
        ({"lr_grid": []}, "lr_grid"),
        ({"lr_grid": [0.0]}, "lr_grid.0"),
        ({"keep_checkpoints": "all"}, "about the runs of an lr_grid"),
    ],
)
def test_grids_that_are_refused(tree, said):
    base = {"checkpoint": "run", "data": [{"path": "data"}], "max_steps": 1}
    with pytest.raises(UserError, match=said):
        validate(FinetuneConfig, base | tree, "test")
