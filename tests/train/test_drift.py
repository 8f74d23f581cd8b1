"""Going on with another configuration: what is refused, by name, and what is free."""

import copy
import json

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train.drift import FREE, check_drift
from sparse_gpt.train.manifest import FORMAT, write_manifest
from tests.test_config import make

CONFIG = make(global_batch_size=8, output_dir="runs/x").model_dump(mode="json")
IDENTITY = {
    "config": CONFIG,
    "data": ["digest of the shards"],
    "global_batch_size": 8,
    "eos_id": 256,
    "tokenizer_sha256": "t" * 64,
    "precision": "fp32",
    "source": None,
}


@pytest.fixture
def saved(tmp_path):
    manifest = {
        "format": FORMAT, "step": 1, "state": {}, "gpt_config": {}, "parameters": {},
        "layers": {}, "topology_digest": "", "files": {}, **IDENTITY,
    }  # fmt: skip
    write_manifest(tmp_path, manifest)
    return tmp_path


def changed(dotted, value):
    identity = copy.deepcopy(IDENTITY)
    *sections, key = dotted.split(".")
    section = identity["config"]
    for name in sections:
        section = section[int(name)] if isinstance(section, list) else section[name]
    assert section[key] != value
    section[key] = value
    return identity


def test_the_same_run_goes_on(saved):
    check_drift(saved, copy.deepcopy(IDENTITY), ())


CHANGES = {
    "seed": 2,
    "max_steps": 20,
    "seq_len": 16,
    "document_attention": True,
    "data.0.weight": 2.0,
    "model.d_model": 128,
    "model.dropout": 0.1,
    "ift.member": "wide",
    "sparsity.sparsity": 0.5,
    "sparsity.algorithm": "rigl",
    "sparsity.update.freq": 7,
    "sparsity.update.mode": "replace",
    "sparsity.structure.type": "block",
    "optimizer.lr": 1e-3,
    "optimizer.betas": [0.9, 0.99],
    "schedule.type": "wsd",
    "deepspeed.communication_data_type": "bf16",
    "evaluation.patience": 3,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_is_named_with_both_values_and_can_be_allowed(saved, key):
    identity = changed(key, CHANGES[key])
    with pytest.raises(UserError) as caught:
        check_drift(saved, identity, ())
    message = str(caught.value)
    assert f"{key}: " in message and repr(CHANGES[key]) in message
    assert str(saved) in message
    assert f"checkpoint.allow_changed=[{key}]" in message
    check_drift(saved, identity, (key,))
    with pytest.raises(UserError):
        check_drift(saved, identity, ("name",))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("output_dir", "elsewhere"),
        ("stop_at", 3),
        ("data.0.path", "/moved"),
        ("checkpoint.every", 3),
        ("logging.every", 1),
        ("deepspeed.zero_stage", 3),
        ("deepspeed.offload_optimizer", "cpu"),
        ("deepspeed.reduce_bucket_size", 1000),
        ("deepspeed.allgather_bucket_size", 1000),
        ("deepspeed.overlap_comm", False),
        ("deepspeed.param_persistence_threshold", 0),
        ("evaluation.every", 7),
        ("evaluation.sequences", 7),
        ("evaluation.final", True),
        ("micro_batch_size", 4),
        ("model.activation_checkpointing", True),
        ("model.loss_chunk", 512),
    ],
)
def test_what_changes_no_number_is_free(saved, key, value):
    check_drift(saved, changed(key, value), ())


@pytest.mark.parametrize("key", ["every", "sequences"])
def test_validations_that_decide_where_a_run_ends_are_not_free(saved, key):
    """With patience, in the saved configuration or now."""
    patient, other = changed("evaluation.patience", 3), changed(f"evaluation.{key}", 7)
    both = copy.deepcopy(patient)
    both["config"]["evaluation"][key] = 7
    with pytest.raises(UserError, match=rf"evaluation\.{key}: None -> 7"):
        check_drift(saved, both, ("evaluation.patience",))
    check_drift(saved, both, ("evaluation.patience", f"evaluation.{key}"))
    write_manifest(saved, {**json.loads((saved / "manifest.json").read_text()), **patient})
    for now, allowed in ((both, ()), (other, ("evaluation.patience",))):
        with pytest.raises(UserError, match=rf"evaluation\.{key}: None -> 7"):
            check_drift(saved, now, allowed)


def test_every_key_of_deepspeed_is_known_to_be_free_or_not():
    """A key that is added changes numbers until it is said not to."""
    keys = {f"deepspeed.{key}" for key in CONFIG["deepspeed"]}
    assert keys - set(FREE) == {"deepspeed.communication_data_type"}


def test_every_changed_key_is_named_at_once(saved):
    identity = changed("optimizer.lr", 1.0)
    identity["config"]["seed"] = 9
    with pytest.raises(UserError, match=r"optimizer\.lr: .*; seed: 1 -> 9"):
        check_drift(saved, identity, ())
    with pytest.raises(UserError) as caught:
        check_drift(saved, identity, ("optimizer.*",))
    assert "optimizer.lr:" not in str(caught.value)


def test_other_data(saved):
    identity = copy.deepcopy(IDENTITY) | {"data": ["other shards"]}
    with pytest.raises(UserError, match=r"data: 'the shards it was trained on'"):
        check_drift(saved, identity, ())
    check_drift(saved, identity, ("data",))


def test_another_global_batch(saved):
    identity = copy.deepcopy(IDENTITY) | {"global_batch_size": 16}
    with pytest.raises(UserError, match=r"global_batch"):
        check_drift(saved, identity, ())


def test_a_broken_manifest_is_refused_by_name(saved):
    (saved / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        check_drift(saved, IDENTITY, ())
