"""A second start of a run: what may have changed, and that nothing is done twice."""

import json
import shutil

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint
from tests.contracts.runs import after_every_step, run_config, trainer
from tests.ranks import run_ranks
from tests.tiny import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    return str(write_corpus(folder, documents=40, val_documents=2))


def start(corpus, out, changes):
    """One start: steps made, checkpoints saved, lines said, and the `UserError` if any."""
    seen = {"steps": [], "saves": [], "said": [], "error": ""}
    try:
        with trainer(run_config(corpus, out, **changes)) as made:
            save, say = made.checkpointer.save, made.metrics.say

            def counted_save(step, state, tag=None):
                seen["saves"].append((tag or "step", step))
                return save(step, state, tag)

            def heard_say(message):
                seen["said"].append(message)
                say(message)

            made.checkpointer.save, made.metrics.say = counted_save, heard_say
            after_every_step(made, lambda step, health, update: seen["steps"].append(step))
            seen["state"] = vars(made.fit())
    except UserError as problem:
        seen["error"] = str(problem)
    return seen


def started(corpus, out, **changes):
    return run_ranks(1, start, corpus, str(out), changes)[0]


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """A run of 12 steps, stopped after 3."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert started(corpus, run, stop_at=3)["saves"] == [("step", 3)]
    return run


@pytest.fixture
def again(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def refusal(corpus, run, **changes):
    manifest = (run / "checkpoints/step-00000003/manifest.json").read_bytes()
    outcome = started(corpus, run, **changes)
    assert outcome["error"], "it was not refused"
    assert outcome["steps"] == outcome["saves"] == []
    assert list_steps(run / "checkpoints") == [3]
    assert (run / "checkpoints/step-00000003/manifest.json").read_bytes() == manifest
    return outcome["error"]


def test_another_global_batch_is_refused_whatever_is_allowed(corpus, again):
    for allowed in ([], ["global_batch_size"], ["*"]):
        said = refusal(corpus, again, global_batch_size=4, checkpoint__allow_changed=allowed)
        assert "a global batch of 8 sequences, this run has 4" in said
        assert "set global_batch_size=8" in said


def test_another_precision_is_refused(corpus, again):
    said = refusal(corpus, again, precision="bf16")
    assert "precision: 'fp32' -> 'bf16'" in said
    assert "checkpoint.allow_changed=[precision]" in said


def test_another_sparsity_is_refused_even_if_allowed(corpus, again):
    """A topology of other counts fits no layer: allowing the key cannot make it fit."""
    said = refusal(corpus, again, sparsity__sparsity=0.5)
    assert "sparsity.sparsity: 0.75 -> 0.5" in said
    allowed = ["sparsity.sparsity"]
    said = refusal(corpus, again, sparsity__sparsity=0.5, checkpoint__allow_changed=allowed)
    assert "another sparsity" in said and "h.0.attn.k.weight" in said
    assert "keep sparsity.sparsity" in said


def test_stopping_twice_at_the_same_step_saves_once(corpus, again):
    before = (again / "checkpoints/step-00000003").stat()
    for stop in (3, 2):
        outcome = started(corpus, again, stop_at=stop)
        assert outcome["error"] == ""
        assert outcome["steps"] == outcome["saves"] == []
        assert outcome["state"]["step"] == 3
    after = (again / "checkpoints/step-00000003").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_start_after_the_end_does_nothing_and_says_so(corpus, again):
    assert started(corpus, again)["steps"] == list(range(4, 13))
    curve = (again / "metrics.jsonl").read_text()
    outcome = started(corpus, again)
    assert outcome["steps"] == outcome["saves"] == []
    assert "nothing to do: the run ended at step 12" in outcome["said"]
    assert (again / "metrics.jsonl").read_text() == curve


def validations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "validation"]


def best_weights(run):
    reader = open_checkpoint(run)
    assert reader.path.name.startswith("best-")
    return reader.path.name, {name: reader.manifest["files"][name] for name in reader.files}


def test_resumed_runs_validate_and_stop_early_as_uninterrupted_ones(corpus, tmp_path):
    """Stops before, at and after validations, one inside the patience."""
    changes = {
        "max_steps": 40,
        "evaluation__every": 2,
        "evaluation__patience": 3,
        "evaluation__sequences": None,
        # The rate rises until the model diverges: the loss first falls, then rises.
        "optimizer__lr": 0.2,
        "optimizer__grad_clip": 0,
        "schedule__warmup_steps": 40,
    }
    whole = started(corpus, tmp_path / "whole", **changes)
    curve = validations(tmp_path / "whole")
    best = min(curve, key=lambda pair: pair[1])[0]
    last = best + 6
    assert best > 2 and last < 40
    assert [step for step, _ in curve] == list(range(2, last + 1, 2))
    assert whole["state"]["finished"] and whole["steps"][-1] == last
    assert whole["saves"][-1] == ("step", last)
    parts, steps = tmp_path / "parts", []
    for stop in (1, 2, best + 1, best + 4, None):
        outcome = started(corpus, parts, **changes, **({"stop_at": stop} if stop else {}))
        steps += outcome["steps"]
        assert outcome["steps"][-1] == (stop or last)
    assert steps == whole["steps"]
    assert validations(parts) == curve
    assert outcome["state"] == whole["state"]
    assert best_weights(parts) == best_weights(tmp_path / "whole")
    assert best_weights(parts)[0] == f"best-{best:08d}"
    over = started(corpus, parts, **changes)
    assert over["steps"] == over["saves"] == []
    assert f"nothing to do: the run ended at step {last}" in over["said"]


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_folder_of_checkpoints_that_has_gone_does_not_begin_the_run_anew(corpus, again, left):
    """A disk that is not mounted: the log stays, and brought back all goes on."""
    log, checkpoints = again / "metrics.jsonl", again / "checkpoints"
    before = log.read_bytes()
    checkpoints.rename(again / "elsewhere")
    if left != "nothing":
        checkpoints.mkdir()  # where the disk was mounted
    outcome = started(corpus, again)
    assert f"{checkpoints} is gone, but a run began in {again}" in outcome["error"]
    assert outcome["steps"] == [] and log.read_bytes() == before
    if left != "nothing":
        checkpoints.rmdir()
    (again / "elsewhere").rename(checkpoints)
    assert started(corpus, again, stop_at=4)["steps"] == [4]
    checkpoints.rename(again / "elsewhere")
    assert started(corpus, again, stop_at=1, checkpoint__resume="never")["steps"] == [1]


def test_a_run_of_an_earlier_version_that_had_not_saved_yet_begins_anew(corpus, tmp_path):
    """Its folder of checkpoints had no id."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert started(corpus, run, stop_at=1)["steps"] == [1]


def test_a_copy_without_hidden_files_goes_on(corpus, again):
    for hidden in (*again.glob(".*"), *(again / "checkpoints").glob(".*")):
        hidden.unlink()
    assert started(corpus, again, stop_at=4)["steps"] == [4]


def test_where_every_checkpoint_was_moved_away_the_run_begins_anew(corpus, again):
    """As is advised for a damaged one: the folder is there, and nothing is lost by a mistake."""
    (again / "checkpoints/step-00000003").rename(again / "damaged")
    assert started(corpus, again, stop_at=1)["steps"] == [1]
