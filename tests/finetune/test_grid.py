"""A grid of learning rates: what is chosen, tested, kept, and not done twice."""

import json
import shutil

import pytest

from sparse_gpt.config_file import read_tree, validate
from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD, UserError
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint
from tests.finetune.runs import asked_to_stop, export, results_of, tune
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


def exported(run, out):
    """The lr and step that were exported, and the bytes of the weights."""
    step = run_ranks(1, export, str(run), str(out))[0]
    facts = json.loads((out / "sparse_gpt.json").read_text())
    assert facts["step"] == step
    return facts["config"]["optimizer"]["lr"], step, (out / "model.safetensors").read_bytes()


def test_the_best_checkpoint_of_the_best_learning_rate_is_exported(corpus, pretrained, tmp_path):
    """At 1 it is never as good again as at the first validation; all checkpoints stay."""
    run = tmp_path / "run"
    often = "evaluation={every: 2, patience: 2}"
    grid = ("lr_grid=[1.0, 1e-9, 3e-3]", "optimizer={}", "max_steps=12", "keep_checkpoints=all")
    results = tuned(corpus, run, pretrained.run, *grid, often)["results"]
    lr, step, weights = exported(run, tmp_path / "chosen")
    assert (lr, step) == (results["lr"], results["tested_step"]) == (3e-3, 12)
    best = run / "lr-0.003/checkpoints/best-00000012"
    assert exported(best, tmp_path / "best")[2] == weights
    # As results.json names it, and the best of that one, not the last.
    results["run"] = "lr-1"
    (run / "results.json").write_text(json.dumps(results))
    (best_step,) = list_steps(run / "lr-1/checkpoints", "best")
    assert best_step < list_steps(run / "lr-1/checkpoints")[-1]
    assert exported(run, tmp_path / "other")[:2] == (1.0, best_step)


def test_the_chosen_one_is_what_a_fine_tuning_goes_on_from(corpus, grid, tmp_path):
    run, _ = grid
    results = tuned(corpus, tmp_path / "next", run)["results"]
    next_run = json.loads((tmp_path / "next/results.json").read_text())
    assert results == next_run and results["checkpoint"] == str(run)
    saved = open_checkpoint(tmp_path / "next").manifest["source"]
    assert saved == open_checkpoint(run / "lr-0.002").identity == open_checkpoint(run).identity


def test_a_grid_that_chose_none_yet(grid, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grid[0], run)
    (run / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json says .* such as .*/run/lr-0\.002$"):
        open_checkpoint(run)
    shutil.rmtree(run / "lr-0.002/checkpoints")
    shutil.copy(grid[0] / "results.json", run)
    with pytest.raises(UserError, match=r"no checkpoint at .*/run/lr-0\.002: no manifest"):
        open_checkpoint(run)


def test_a_grid_in_the_folder_of_a_single_run(corpus, pretrained, grid, tmp_path):
    """`results.json` is of the later one, and says whose checkpoints count."""
    run = tmp_path / "run"
    shutil.copytree(grid[0], run)
    shutil.copytree(run / "lr-0.002/checkpoints", run / "checkpoints")
    assert open_checkpoint(run).path.parents[1] == run / "lr-0.002"
    results = json.loads((run / "results.json").read_text())
    del results["run"]
    (run / "results.json").write_text(json.dumps(results))
    assert open_checkpoint(run).path.parents[1] == run


TWO = ("lr_grid=[2e-4, 2e-3]", "optimizer={}", "max_steps=4")
FIRST, SECOND = ([f"lr-{lr}:{step}" for step in (1, 2, 3, 4)] for lr in ("0.0002", "0.002"))


def started(corpus, run, checkpoint, *more, place="", file="", ranks=1):
    """Exit code and steps of one start."""
    arguments = (corpus, str(run), str(checkpoint), [*TWO, *more], place, file)
    first, *others = run_ranks(ranks, asked_to_stop, *arguments)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(
    ("place", "file", "trained"),
    [
        ("lr-0.0002:2", "STOP", FIRST[:2]),
        ("lr-0.0002:end", "STOP", FIRST),  # between two learning rates
        ("lr-0.002:3", "STOP", FIRST + SECOND[:3]),
        ("lr-0.002:3", "lr-0.002/STOP", FIRST + SECOND[:3]),
    ],
)
def test_a_stop_file_in_the_run_folder(corpus, pretrained, grid, tmp_path, place, file, trained):
    """Seen whichever learning rate runs; it stays, and once it is removed the rest is done."""
    run = tmp_path / "run"
    stopped = started(corpus, run, pretrained.run, place=place, file=file)
    assert stopped == (EXIT_STOPPED_FOR_GOOD, trained)
    assert (run / file).exists() and not (run / "results.json").exists()
    assert started(corpus, run, pretrained.run) == (EXIT_STOPPED_FOR_GOOD, [])
    (run / file).unlink()
    left = [step for step in FIRST + SECOND if step not in trained]
    assert started(corpus, run, pretrained.run) == (0, left)
    results = json.loads((run / "results.json").read_text())
    assert results["test"] == grid[1]["test"]


def test_a_stop_file_that_is_there_before_the_first_learning_rate(corpus, pretrained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    assert started(corpus, run, pretrained.run, ranks=2) == (EXIT_STOPPED_FOR_GOOD, [])
    assert (run / "STOP").exists() and not list(run.rglob("step-*"))


@pytest.mark.parametrize(
    ("place", "trained"),
    [("lr-0.0002:3", FIRST[:3]), ("lr-0.0002:end", FIRST), ("lr-0.002:2", FIRST + SECOND[:2])],
)
def test_a_deadline_in_minutes_is_that_of_the_whole_grid(
    corpus, pretrained, tmp_path, place, trained
):
    """A minute is left of three; it goes by in, or after, one of the learning rates."""
    deadline = "checkpointing={deadline: 3, deadline_margin: 2, keep_last: 1}"
    stopped = started(corpus, tmp_path / "run", pretrained.run, deadline, place=place)
    assert stopped == (EXIT_STOPPED, trained)


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
