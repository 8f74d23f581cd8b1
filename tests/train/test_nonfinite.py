"""Numbers that are not finite, and loss spikes: reported by place, counted, rolled back."""

import hashlib
import json
import math
from dataclasses import asdict
from unittest.mock import patch

import pytest

from sparse_gpt.config import OptimizerConfig
from sparse_gpt.errors import UserError
from sparse_gpt.topology.keys import NonFiniteScores
from sparse_gpt.train.spikes import LEAST, spike_record
from sparse_gpt.train.state import TrainState
from tests.contracts.runs import run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=2))


def train(corpus, out, bad_samples, gradient=False, **changes):
    """A run in which some samples of the data are poison: to the loss, or to the gradient alone."""
    said, steps, states = [], [], []
    with trainer(run_config(corpus, out, **changes)) as made:
        poison = [made.train_data.sample(i)["tokens"][:-1].tolist() for i in bad_samples]
        inside = []

        def look(module, inputs, kwargs):
            ids = inputs[0] if inputs else kwargs["input_ids"]
            inside[:] = [any(row in poison for row in ids.tolist())]

        def spoil(module, inputs, output):
            if not (inside and inside[0] and output.requires_grad):
                return output
            if not gradient:
                return output * math.inf
            output.register_hook(lambda found: found * math.nan)
            return output

        made.engine.module.register_forward_pre_hook(look, with_kwargs=True)
        made.engine.module.h[1].register_forward_hook(spoil)
        say, step = made.metrics.say, made._step
        made.metrics.say = lambda text: (said.append(text), say(text))

        def seen_step(number, batches):
            steps.append((number, made.state.samples))
            parts = [tensor for _, f in made.shards.fragments() for tensor in f.tensors().values()]
            content = b"".join(part.float().numpy().tobytes() for part in parts)
            states.append((hashlib.sha256(content).hexdigest(), made.controller.digest()))
            return step(number, batches)

        made._step = seen_step
        try:
            made.fit()
            problem = ""
        except UserError as error:
            problem = str(error)
        return {
            "states": states,
            "said": said,
            "steps": steps,
            "state": vars(made.state),
            "problem": problem,
        }


def records(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_bad_loss_is_reported_with_rank_sample_and_layer(corpus, tmp_path):
    """Sample 22 is in step 3 (8 samples a step, 2 a micro-batch), micro-step 2 of rank 1."""
    first, second = run_ranks(
        2, train, corpus, str(tmp_path / "run"), [22], max_steps=4, optimizer__max_nonfinite_steps=1
    )
    assert first["problem"] == second["problem"]
    said = first["problem"]
    assert "1 steps in a row" in said and "last: step 3, loss " in said
    assert "the loss of micro-step 2 of rank 1 (sample 22: tokens " in said
    assert "; sample 23: tokens " in said and f" of {corpus}, train, document" in said
    assert "gradients of " in said and "the farthest " in said
    assert first["state"]["skipped_steps"] == 1
    (record,) = records(tmp_path / "run", "diverged")  # the last line: an experiment looks for it
    assert (record["step"], said.startswith(record["because"])) == (3, True)
    last = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == record


def test_a_bad_gradient_is_reported_with_the_layer_nearest_the_loss(corpus, tmp_path):
    run = tmp_path / "run"
    first, _ = run_ranks(2, train, corpus, str(run), [0], gradient=True, max_steps=3)
    assert first["problem"] == "" and first["state"]["skipped_steps"] == 1
    (record,) = records(run, "nonfinite")
    assert record["step"] == 1 and math.isfinite(records(run, "train")[0]["loss"])
    assert "no loss of samples 0 to 7" in record["found"]
    nearest = record["found"].split("the nearest to the loss ")[1].split(",")[0]
    assert nearest.startswith("h.1.")
    assert f"skipped    step 1  {record['found']}" in first["said"]


def test_a_rollback_goes_on_from_the_checkpoint_with_the_data_after(corpus, tmp_path):
    """Bad are steps 6 and 7: step 6, though due, is not saved; samples 32 to 55 are skipped."""
    run = tmp_path / "run"
    changes = {
        "max_steps": 8,
        "checkpoint__every": 2,
        "optimizer__max_nonfinite_steps": 2,
        "optimizer__on_nonfinite": "rollback",
    }
    first, second = run_ranks(2, train, corpus, str(run), [41, 49], **changes)
    assert (
        first["steps"]
        == second["steps"]
        == [
            *((step, 8 * step - 8) for step in range(1, 8)),
            *((step, 8 * step + 16) for step in range(5, 9)),
        ]
    )
    state = first["state"]
    assert (state["step"], state["samples"], state["skipped_steps"]) == (8, 88, 2)
    assert state["rollbacks"] == 1 and state["tokens"] == 88 * 32
    (record,) = records(run, "rollback")
    assert record["step"] == 4 and record["skipped_samples"] == 24
    assert [bad["step"] for bad in record["bad_steps"]] == [6, 7]
    for bad in record["bad_steps"]:  # no other line of the log tells of them any more
        assert f"skipped    step {bad['step']}  {bad['found']}" in first["said"]
    assert not records(run, "nonfinite")
    assert [r["step"] for r in records(run, "train")] == list(range(1, 9))
    assert any(text.startswith("rolled back to step 4  ") for text in first["said"])
    assert all(math.isfinite(float(r["loss"])) for r in records(run, "train"))
    # Weights, moments and masks before step 5, both times, and before both bad ones.
    starts = first["states"]
    assert starts[4] == starts[7] and starts[5] == starts[6]
    assert len({*starts[:6], *starts[8:]}) == 9


@pytest.mark.parametrize("mode", ["stop", "rollback"])
@pytest.mark.parametrize("step", [4, 6])  # before them; after the first
def test_a_stop_among_bad_steps_changes_nothing(corpus, tmp_path, mode, step):
    """Bad are steps 6 and 7 of 9; a run that stopped meanwhile ends as the undisturbed one."""
    changes = {
        "max_steps": 9,
        "checkpoint__every": 4,
        "checkpoint__keep_last": 1,
        "optimizer__max_nonfinite_steps": 2,
        "optimizer__on_nonfinite": mode,
    }
    whole = run_ranks(1, train, corpus, str(tmp_path / "whole"), [41, 49], **changes)[0]
    run = tmp_path / "run"
    run_ranks(1, train, corpus, str(run), [41, 49], stop_at=step, **changes)
    unsure = run / "checkpoints" / f"unsure-{step:08d}"
    assert unsure.exists() == (mode == "rollback" and step == 6)
    again = run_ranks(1, train, corpus, str(run), [41, 49], **changes)[0]
    assert again["steps"] == whole["steps"][step:]
    assert again["states"] == whole["states"][step:]
    assert (again["state"], again["problem"]) == (whole["state"], whole["problem"])
    assert whole["problem"].startswith("2 steps in a row") == (mode == "stop")
    assert not unsure.exists()


@pytest.mark.slow
def test_rollbacks_are_limited_and_need_a_checkpoint(corpus, tmp_path):
    changes = {
        "max_steps": 8,
        "optimizer__max_nonfinite_steps": 1,
        "optimizer__on_nonfinite": "rollback",
        "optimizer__max_rollbacks": 1,
    }
    bad = [16, 24]
    for name, every, tried in (("with", 1, " after 1 rollbacks"), ("without", None, "")):
        out = tmp_path / name
        found = run_ranks(1, train, corpus, str(out), bad, checkpoint__every=every, **changes)[0]
        assert f"{tried}; the weights are those of step 2. Lower" in found["problem"]
        assert found["state"]["rollbacks"] == (1 if tried else 0)


def update_that_raises(corpus, out, kind):
    with trainer(run_config(corpus, out)) as made:

        def update(*arguments):
            raise NonFiniteScores if kind == "scores" else ValueError("a fault")

        with patch.object(type(made.controller.method), "update", update):
            try:
                made.fit()
            except ValueError as error:
                return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("kind", "expected", "words"),
    [
        ("scores", "UserError", "step 3: scores are not finite: no topology update; a weight"),
        ("other", "ValueError", "a fault"),
    ],
)
def test_only_bad_scores_are_reported_as_bad_weights(corpus, tmp_path, kind, expected, words):
    ((name, message),) = run_ranks(1, update_that_raises, corpus, str(tmp_path / "run"), kind)
    assert name == expected and message.startswith(words)


def test_max_rollbacks_needs_rollback():
    with pytest.raises(ValueError, match="max_rollbacks is set, but on_nonfinite is stop"):
        OptimizerConfig(max_rollbacks=7)


# Spikes.


def test_a_spike_is_a_loss_far_above_the_median_of_those_before():
    quiet = [3.0 + 0.01 * (i % 3) for i in range(LEAST)]
    assert spike_record(9.0, quiet[1:]) is None, "too few"
    assert spike_record(3.05, quiet) is None
    found = spike_record(4.0, quiet)
    assert found is not None and found["median"] == 3.01
    assert found["limit"] == pytest.approx(3.01 + 8 * 0.01 * 3.01)
    assert spike_record(4.0, [*quiet[5:], 9.0, 9.0, 9.0, 9.0, 9.0]) is not None, "outliers"
    noisy = [3.0 + 0.1 * (i % 5) for i in range(LEAST)]
    assert spike_record(4.0, noisy) is None
    assert spike_record(1.0, quiet) is None, "downward"


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    saved = vars(TrainState(step=3, samples=24))
    old = {key: value for key, value in saved.items() if key not in ("recent_losses", "rollbacks")}
    state = TrainState(rollbacks=2, recent_losses=[1.0])
    state.restore(old, tmp_path)
    assert state == TrainState(step=3, samples=24)
    for broken in ({**saved, "more": 1}, {k: v for k, v in saved.items() if k != "tokens"}):
        with pytest.raises(UserError, match="its state holds"):
            state.restore(broken, tmp_path)


def spiking(corpus, out):
    """A run whose losses were low so far, for a step of the usual loss."""
    with trainer(run_config(corpus, out, stop_at=2)) as made:
        made.state.recent_losses = [0.1, 0.11] * (LEAST // 2)
        return asdict(made.fit())["recent_losses"]


def test_a_run_logs_its_spikes_and_remembers_their_losses(corpus, tmp_path):
    (recent,) = run_ranks(1, spiking, corpus, str(tmp_path / "run"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    spikes = [r for r in records if r["kind"] == "spike"]
    assert [(r["step"], r["loss"]) for r in spikes] == list(losses.items())
    assert [r["step"] for r in spikes] == [1, 2]
    assert all(0.1 <= r["median"] <= 0.11 and 0.1 < r["limit"] < 1 < r["loss"] for r in spikes)
    assert recent == [0.1, 0.11] * (LEAST // 2) + list(losses.values())
