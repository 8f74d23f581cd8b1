"""The runs of an experiment: their settings, order, and FLOPs that match exactly what the ledger
says."""

from pathlib import Path

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.plan import Planner
from sparse_gpt.experiment.spec import load_experiment
from sparse_gpt.model.flops import active_counts, sequence_flops
from tests.experiment.tiny import BASE, WIDE, write_experiment

V, S, B, STEPS = 257, 16, 4, 12
DENSE = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 64}


def planner(tmp_path: Path, **changes) -> Planner:
    return Planner(load_experiment(write_experiment(tmp_path, **changes)), tmp_path / "work")


def dense(**dims: int) -> int:
    """FLOPs of a step."""
    return B * sequence_flops({**DENSE, **dims}, S, V).total


def test_runs_of_a_seed_stand_together_and_differ_in_nothing_else(tmp_path):
    arms = {"dense": {"seeds": [1, 2, 3]}, "sparse": {"settings": WIDE}}
    runs = planner(tmp_path, seeds=[1, 2], arms=arms).runs()
    names = ["dense-s1", "sparse-s1", "dense-s2", "sparse-s2", "dense-s3"]
    assert [run.name for run in runs] == names
    assert [run.folder for run in runs] == [tmp_path / "work" / name for name in names]
    first, second = (runs[i].config.model_dump() for i in (0, 2))
    assert {key for key in first if first[key] != second[key]} == {"name", "output_dir", "seed"}
    assert runs[1].config.sparsity.algorithm == "set"
    assert runs[1].config.sparsity.update.freq == 3  # of the base
    assert runs[0].config.evaluation.final
    assert runs[0].config.data[0].path == tmp_path / "tokens"


def test_the_batch_is_stated_where_the_base_leaves_it_to_the_ranks(tmp_path):
    """Runs are known by their configuration, in which micro batches are free."""
    (run,) = planner(tmp_path, arms={"dense": {}}).runs()
    assert (run.config.micro_batch_size, run.config.global_batch_size) == (4, 4)
    base = {**BASE, "global_batch_size": None}
    (run,) = planner(tmp_path, arms={"dense": {}}, base=base, ranks=2).runs()
    assert run.config.global_batch_size == 8


def test_flops_and_ratios_are_the_ledgers(tmp_path):
    _, sparse = planner(tmp_path).runs()
    wide = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_ff": 128}
    step = B * sequence_flops(wide, S, V, active_counts(wide, 0.75)).total
    assert sparse.plan.flops_total == STEPS * step
    assert sparse.ratio_model == step / dense()
    assert sparse.ratio_layers == 1.0


def test_more_tokens_for_the_flops_of_another_arm(tmp_path):
    arms = {
        "dense": {},
        "sparse": {"settings": WIDE},
        "more": {"like": "sparse", "match_flops": "tokens"},
    }
    _, sparse, more = planner(tmp_path, arms=arms).runs()
    steps, target = more.plan.steps, sparse.plan.flops_total
    assert more.plan.flops_total == steps * dense()
    assert abs(steps * dense() - target) == min(
        abs(n * dense() - target) for n in range(1, 5 * STEPS)
    )
    assert steps > STEPS and more.plan.warmup_steps == -(-steps // 4)  # stretched
    assert more.match is not None and more.match.settings == {"max_steps": steps}
    assert more.match.residual == pytest.approx(steps * dense() / target - 1)
    assert more.config.sparsity.sparsity == 0.0 and more.config.ift.member == "none"


def test_more_width_for_the_flops_of_another_arm(tmp_path):
    arms = {
        "dense": {},
        "sparse": {"settings": WIDE},
        "wider": {"like": "sparse", "match_flops": "width"},
        "wider_slow": {"like": "wider", "settings": {"optimizer.lr": 0.001}},
    }
    _, sparse, wider, slow = planner(tmp_path, arms=arms).runs()
    target = sparse.plan.flops_total
    costs = {d: STEPS * dense(d_model=d, d_ff=4 * d) for d in range(2, 65, 2)}
    best = min(costs, key=lambda d: abs(costs[d] - target))
    assert best > 16
    inner = {f: STEPS * dense(d_model=best, d_ff=f) for f in range(1, 300)}
    rest = min(inner, key=lambda f: abs(inner[f] - target))
    assert rest != 4 * best  # what a step of d_model leaves over
    assert (wider.config.model.d_model, wider.config.model.d_ff) == (best, rest)
    assert wider.plan.flops_total == inner[rest] and wider.plan.steps == STEPS
    assert slow.plan.flops_total == inner[rest] and slow.config.optimizer.lr == 0.001


def test_tokens_are_matched_where_the_base_gives_tokens(tmp_path):
    path = write_experiment(
        tmp_path,
        arms={
            "dense": {},
            "sparse": {"settings": WIDE},
            "more": {"like": "sparse", "match_flops": "tokens"},
        },
    )
    overrides = ["base.max_steps=null", f"base.max_tokens={STEPS * B * S}"]
    runs = Planner(load_experiment(path, overrides), tmp_path).runs()
    assert runs[2].config.max_steps is None and runs[2].config.max_tokens
    assert abs(runs[2].plan.flops_total / runs[1].plan.flops_total - 1) < 0.05


def test_mappings_add_to_those_of_the_base(tmp_path):
    arms = {"dense": {}, "x": {"settings": {"sparsity": {"sparsity": 0.5, "update.stop": 0.5}}}}
    with pytest.raises(UserError, match=r"arms.x: sparsity.update.stop: unknown key"):
        planner(tmp_path, arms=arms).runs()
    arms["x"]["settings"] = {"sparsity": {"sparsity": 0.5, "update": {"stop": 0.5}}}
    sparsity = planner(tmp_path, arms=arms).runs()[1].config.sparsity
    assert (sparsity.update.stop, sparsity.update.freq) == (0.5, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"baseline": "dens"}, "baseline: dens is no arm; arms: dense, sparse"),
        ({"arms": {"dense": {}, "x": {"match_flops": "tokens"}}}, "match_flops needs like"),
        ({"arms": {"dense": {}, "x": {"like": "y"}}}, "arms.x.like: y is no arm"),
        (
            {"arms": {"dense": {}, "x": {"like": "y"}, "y": {"like": "x"}}},
            "like goes in a circle: x -> y -> x",
        ),
        ({"arms": {"dense": {}, "a/b": {}}}, "arms.a/b"),
        ({"seeds": [1, 1]}, "give each seed once"),
        ({"compare": [["sparse", "dense2"]]}, "compare: dense2 is no arm"),
        ({"data": {"text": {"path": "x", "input": "y"}}}, "exactly one of path, input, dataset"),
        ({"arms": {"dense": {}, "x": {"setings": {}}}}, "setings: unknown key"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        load_experiment(write_experiment(tmp_path, **changes))


def test_settings_that_no_run_has_are_refused_with_the_arm(tmp_path):
    arms = {"dense": {}, "x": {"settings": {"optimizer.lrr": 1.0}}}
    with pytest.raises(UserError, match=r"arms.x: optimizer.lrr: unknown key; did you mean 'lr'"):
        planner(tmp_path, arms=arms).runs()


def test_unprepared_text_of_a_variable_that_is_not_set(tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    data = {"text": {"input": "$NOWHERE/books", "vocab_size": 300}}
    made = planner(tmp_path, data=data)
    assert made.runs()[0].plan.model.vocab_size == 300
    with pytest.raises(UserError, match=r"data.text.input: the variable NOWHERE is not set"):
        made.corpora.prepare("text", workers=1)
