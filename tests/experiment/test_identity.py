"""Which changes of a configuration make another run."""

import json

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import load_config, validate
from sparse_gpt.experiment.identity import changes, config_tree, tree_sha256
from tests.ranks import ROOT


def config(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs/debug.yaml", list(overrides))


def saved(*overrides: str) -> dict:
    """As a record has it: through JSON."""
    return json.loads(json.dumps(config_tree(config(*overrides))))


def test_the_same_run_wherever_and_however_it_is_laid_out():
    elsewhere = config(
        *("name=x", "output_dir=/elsewhere", "data=[{path: /other/tokens}]", "stop_at=3"),
        *("micro_batch_size=2", "deepspeed.zero_stage=3", "sparsity.storage=masked"),
        *("checkpoint.every=7", "logging.every=1", "evaluation.every=11", "peak_tflops=3.0"),
    )
    assert changes(saved(), elsewhere) == []
    assert config_tree(elsewhere) == config_tree(config())
    text = json.dumps(saved("data=[{path: /other/tokens}]", "output_dir=/elsewhere"))
    assert "other" not in text and "elsewhere" not in text


def test_what_is_computed_makes_another_run():
    for key, value in (
        ("seed", 2),
        ("max_steps", 41),
        ("optimizer.lr", 0.001),
        ("sparsity.update.freq", 11),
        ("evaluation.patience", 3),
    ):
        (change,) = changes(saved(), config(f"{key}={value}"))
        assert change.startswith(f"{key}: ") and change.endswith(f"-> {value}")
        assert tree_sha256(saved()) != tree_sha256(saved(f"{key}={value}"))
    assert changes(saved(), config("data=[{path: x}, {path: y}]"))[0].startswith("data: ")


def test_keys_that_came_since_had_their_defaults():
    old = saved()
    del old["optimizer"]["growth"], old["document_attention"], old["sparsity"]["gmp"]
    assert changes(old, config()) == []
    assert changes(old, config("document_attention=true")) == ["document_attention: False -> True"]


def test_a_record_of_keys_that_are_gone_is_of_another_run():
    old = saved()
    old["optimizer"]["lookahead"] = 5
    (change,) = changes(old, config())
    assert "no longer understood" in change and "optimizer.lookahead" in change


def test_a_saved_tree_with_the_free_keys_is_a_whole_configuration():
    tree = saved()
    tree["data"] = [{"path": "x"}]
    assert validate(RunConfig, tree, "test").model == config().model
