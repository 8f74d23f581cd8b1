"""Fine-tuning as a stage: which runs it plans, when they may start, and their records."""

import json
import shutil
from typing import Any
from unittest import mock

import pytest

from sparse_gpt.config_file import dump_yaml
from sparse_gpt.errors import UserError
from sparse_gpt.experiment import runner as running
from sparse_gpt.experiment.estimate import Estimates
from sparse_gpt.experiment.finetune_record import finetune_record
from sparse_gpt.experiment.page import write
from sparse_gpt.experiment.plan import Planner
from sparse_gpt.experiment.record import Records, make_record
from sparse_gpt.experiment.results import Record, read
from sparse_gpt.experiment.runner import Runner
from sparse_gpt.experiment.sessions import Sessions
from sparse_gpt.experiment.show import Show, list_runs
from sparse_gpt.experiment.spec import load_experiment
from sparse_gpt.experiment.stages import all_runs, has_weights
from sparse_gpt.finetune import spdf
from sparse_gpt.finetune.spdf import finetune
from sparse_gpt.train import pretrain as pretraining
from tests.experiment.tiny import BASE, write_experiment
from tests.ranks import ROOT, run_ranks

TUNING = {
    "data": [{"path": "text"}],
    "lr_grid": [1e-3, 2e-3, 4e-3],
    "epochs": 0.05,
    "micro_batch_size": 4,
    "precision": "fp32",
    "deepspeed": {"zero_stage": 0},
    "logging": {"every": 1},
}
PAPER = ("dense", "wide50", "wide75")  # rows of Table 21
CONTROLS = ("static75", "dense_tokens", "dense_wide", "wide_projection")
TUNED = [
    f"{arm}, then {mode}"
    for arm in (*PAPER, *CONTROLS)
    for mode in ("dense", "sparse")
    if mode == "dense" or arm in ("wide50", "wide75", "static75")
]


def stages(modes=("dense", "sparse"), **changes):
    return [{"finetune": {"modes": list(modes), "config": TUNING | changes}}]


def planned(folder, **changes) -> list[Any]:
    experiment = load_experiment(write_experiment(folder, **{"stages": stages(), **changes}))
    return all_runs(Planner(experiment, folder / "work"))


def test_stages_follow_their_pretraining_and_dense_models_have_no_masks(tmp_path):
    runs = planned(tmp_path, seeds=[1, 2])
    of_seed = ["dense-s{}", "dense-s{}-finetune-dense", "sparse-s{}", "sparse-s{}-finetune-dense",
               "sparse-s{}-finetune-sparse"]  # fmt: skip
    assert [run.name for run in runs] == [name.format(s) for s in (1, 2) for name in of_seed]
    dense, sparse = runs[3], runs[4]
    assert dense.after is sparse.after is runs[2]
    assert sparse.config.checkpoint == runs[2].folder
    assert (sparse.config.mode, sparse.config.seed) == ("sparse", 1)
    assert sparse.config.data[0].path == tmp_path / "tokens"
    # Three learning rates; 4 sequences of 16 tokens a step.
    assert dense.plan.steps % 3 == 0 and dense.plan.tokens == dense.plan.steps * 4 * 16
    assert dense.plan.flops_total > sparse.plan.flops_total
    assert dense.after_sha256 == sparse.after_sha256 != runs[1].after_sha256
    assert "sparse, then dense" in list_runs(runs, dict.fromkeys([r.name for r in runs]),
                                             Estimates(), 1)  # fmt: skip


def test_the_shipped_experiment_is_table_21_in_small(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_GPT_DATA", str(tmp_path))
    experiment = load_experiment(ROOT / "configs/experiments/small/spdf.yaml")
    runs: list[Any] = [run for run in all_runs(Planner(experiment, tmp_path)) if run.seed == 1]
    rows = [run.row for run in runs]
    assert [row for row in rows if "then" not in row] == [*PAPER, *CONTROLS]
    assert [row for row in rows if "then" in row] == TUNED
    assert [run.plan.sparsity for run in runs if run.stage == "pretrain"] == [
        *(0.0, 0.5, 0.75),
        *(0.75, 0.0, 0.0, 0.0),
    ]


def test_table_21_has_the_paper_s_recipe(tmp_path):
    experiment = load_experiment(ROOT / "configs/experiments/table21.yaml")
    runs: list[Any] = all_runs(Planner(experiment, tmp_path))
    tuned = [run for run in runs if run.stage == "finetune"]
    assert [run.row for run in tuned] == TUNED
    for run in tuned:
        config = run.config
        assert config.lr_grid == (5e-3, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
        assert (config.global_batch_size, config.epochs, config.seq_len) == (32, 10, None)
        assert run.after.plan.model.n_positions == 2048
        assert config.evaluation.patience == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stages": stages(seed=3)}, r"stages\.0\.finetune\.config\.seed: the experiment sets it"),
        ({"stages": stages(data=[{"path": "x"}])}, "names no corpus of this experiment"),
        ({"stages": stages(epoch=1)}, "did you mean 'epochs'"),
        ({"stages": stages() + stages(["sparse"])}, "a mode of fine-tuning is given twice"),
        ({"stages": [{"finetune": {"arms": ["none"], "config": TUNING}}]}, "none is no arm"),
    ],
)
def test_what_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        planned(tmp_path, **changes)


def test_fine_tuning_waits_for_its_pretraining(tmp_path):
    runs = planned(tmp_path)[2:]
    records = Records(tmp_path)
    made = Runner(runs, records, mock.Mock(), [], 1, Show(Estimates(), 1))
    before, dense, sparse = made.jobs
    assert [made._is_ready(job) for job in made.jobs] == [True, False, False]
    before.state = "running"
    assert not made._is_ready(dense)
    before.state = "done"
    assert made._is_ready(dense) and made._is_ready(sparse)
    before.state = "failed"
    assert not made._is_ready(dense) and dense.state == "failed"


def test_pretraining_whose_weights_are_gone_is_repeated_if_they_are_needed(tmp_path):
    runs = planned(tmp_path)[2:]
    done = {runs[0].name, runs[1].name}
    records: Any = Records(tmp_path)
    records.why_not_done = lambda run, corpora: None if run.name in done else ""
    made = Runner(runs, records, mock.Mock(), [], 1, Show(Estimates(), 1))
    made._skip_done()
    assert [job.state for job in made.jobs] == ["queued", "done", "queued"]
    done.add(runs[2].name)
    made = Runner(runs, records, mock.Mock(), [], 1, Show(Estimates(), 1))
    made._skip_done()
    assert {job.state for job in made.jobs} == {"done"}


def in_a_rank(path, stage):
    """What the scripts do, in a rank of the pool."""
    with mock.patch.object(pretraining.dist, "destroy_process_group"):
        if stage == "finetune":
            with mock.patch.object(spdf.dist, "destroy_process_group"):
                finetune(path)
        else:
            pretraining.pretrain(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sparse arm with both fine-tunings, run without the runner."""
    folder = tmp_path_factory.mktemp("stage")
    for run in planned(folder)[2:]:
        running.set_aside(run, Planner(load_experiment(folder / "tiny.yaml"),
                                       folder / "work").corpora, mock.Mock())  # fmt: skip
        (run.folder / "run.yaml").write_text(dump_yaml(run.config))
        Sessions(run.folder).begin(100.0)
        run_ranks(1, in_a_rank, str(run.folder / "run.yaml"), run.stage)
    return folder


def test_records(folder, tmp_path):
    runs = planned(folder)[2:]
    corpora = Planner(load_experiment(folder / "tiny.yaml"), folder / "work").corpora
    records = Records(tmp_path)
    assert has_weights(runs[0])
    records.write(runs[0], corpora, make_record)
    for run in runs[1:]:
        record = records.write(run, corpora, finetune_record)
        parsed: Any = Record.model_validate_json(json.dumps(record))
        tuned = parsed.finetune
        assert tuned.mode == run.config.mode == parsed.mode
        assert {float(lr) for lr in tuned.lr_grid} == {1e-3, 2e-3, 4e-3}
        assert min(tuned.lr_grid.values()) == parsed.loss.val == tuned.val.loss
        assert parsed.loss.test == tuned.test.loss
        assert 0 < tuned.weights_never_active < tuned.weights_outside_masks
        assert parsed.curve[-1][0] == parsed.steps == run.plan.steps // 3
        assert running.progress_of(run)[0] == run.plan.steps
        assert records.why_not_done(run, corpora) is None
    other = planned(folder, stages=stages(epochs=0.1))
    assert "epochs: 0.05 -> 0.1" in str(records.why_not_done(other[3], corpora))
    pretrained_longer = planned(folder, base=BASE | {"max_steps": 16})
    assert "the run before it is another" in str(
        records.why_not_done(pretrained_longer[3], corpora)
    )
    before = Records(tmp_path).path(runs[2].name)
    record = json.loads(before.read_text())
    record["after_data"]["text"]["identity"] = "others"
    before.write_text(json.dumps(record))
    assert "the run before it: data.text: other tokens" in str(
        records.why_not_done(planned(folder)[4], corpora)
    )
    record["after_data"]["text"]["identity"] = corpora.opened("text").identity
    before.write_text(json.dumps(record))
    page = write(tmp_path)
    assert len(read(tmp_path).records) == 3
    assert "Fine-tuned arms" in page.read_text()


def test_other_weights_to_start_from_set_the_folder_aside(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    runs = planned(tmp_path / "copy")[2:]
    corpora = Planner(load_experiment(tmp_path / "copy/tiny.yaml"), tmp_path / "copy/work").corpora
    show = mock.Mock()
    running.set_aside(runs[1], corpora, show)
    show.say.assert_not_called()
    with mock.patch.object(running, "weights_of", return_value="others"):
        running.set_aside(runs[1], corpora, show)
    assert "other weights to start from" in show.say.call_args.args[0]
    assert runs[1].folder.with_name(f"{runs[1].name}.old1").is_dir()
