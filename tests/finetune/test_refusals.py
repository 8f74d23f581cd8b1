"""What fine-tuning refuses before it trains: in words of the configuration."""

import json
import shutil
from pathlib import Path

import pytest

from sparse_gpt.data.tokenizer import folder_sha256
from tests.finetune.runs import tune
from tests.ranks import run_ranks


def refusal(corpus, out, checkpoint, *overrides):
    outcome = run_ranks(1, tune, str(corpus), str(out), str(checkpoint), list(overrides))[0]
    assert "error" in outcome, "it was not refused"
    assert not outcome["started"]
    assert not (out / "checkpoints").exists()
    return outcome["error"]


@pytest.fixture
def other_tokenizer(corpus, tmp_path):
    """The same shards under a tokenizer with another end token."""
    copy = Path(shutil.copytree(corpus, tmp_path / "other_tokenizer"))
    for file in (copy / "tokenizer").glob("*.json"):
        file.write_text(file.read_text().replace("<|endoftext|>", "<|the_end|>"))
    index = json.loads((copy / "index.json").read_text())
    before = index["tokenizer_sha256"]
    index["tokenizer_sha256"] = folder_sha256(copy / "tokenizer")
    assert index["tokenizer_sha256"] != before
    (copy / "index.json").write_text(json.dumps(index))
    return copy, before, index["tokenizer_sha256"]


def test_data_of_another_tokenizer(other_tokenizer, pretrained, tmp_path):
    copy, trained_with, of_data = other_tokenizer
    message = refusal(copy, tmp_path / "run", pretrained.run)
    assert "another tokenizer" in message and "--tokenizer" in message
    assert trained_with[:12] in message and of_data[:12] in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["micro_batch_size=3"], "global_batch_size 8 is not a multiple of micro_batch_size 3"),
        (["precision=bf16", "deepspeed.zero_stage=0"], "deepspeed.zero_stage: 1"),
        (["seq_len=64"], "seq_len 64 is longer than the 32 positions of the checkpoint"),
        (["schedule.warmup_steps=4"], "4 warmup steps"),
        (["epochs=1"], "give exactly one of epochs, max_steps"),
        (["mode=gradual"], "leave max_steps out"),
        (["mode=gradual", "max_steps=null", "evaluation.patience=2"], "leave evaluation.patience"),
        (["mode=gradual", "max_steps=null", "deepspeed.zero_stage=3"], "zero_stage: 2 or lower"),
        (["tied_embedding=embedding"], "tied_embedding is of mode: gradual"),
        (["optimiser.lr=1"], "did you mean 'optimizer'"),
    ],
    ids=[
        "batch",
        "bf16 stage 0",
        "seq_len",
        "warmup",
        "epochs and steps",
        "gradual steps",
        "gradual patience",
        "gradual stage 3",
        "tied",
        "misspelt",
    ],
)
def test_keys_that_do_not_fit(corpus, pretrained, tmp_path, overrides, said):
    assert said in refusal(corpus, tmp_path / "run", pretrained.run, *overrides)


def test_a_checkpoint_that_is_not_there(corpus, tmp_path):
    message = refusal(corpus, tmp_path / "run", tmp_path / "nowhere")
    assert "no checkpoint at" in message and "nowhere" in message
