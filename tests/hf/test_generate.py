"""Text generation from exported folders and from checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_gpt.errors import UserError
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.hf.generate import exported, generate
from tests.hf.checkpoints import sparse_model, write_run, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, sparse_model())
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(run):
    export_checkpoint(run, run / "export")
    return run / "export"


def test_greedy_is_our_models_own_choice(folder):
    text = generate(folder, "mask ", temperature=0, max_new_tokens=8)
    model, ids = sparse_model(), list(b"mask ")
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == 256:
                break
    assert text == bytes(i for i in ids if i < 256).decode(errors="replace")


def test_a_seed_is_a_text(folder):
    texts = [generate(folder, "a", seed=seed, max_new_tokens=30) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("a")


def test_an_empty_prompt_and_the_default_length(folder):
    text = generate(folder, "", seed=3, top_k=20, top_p=0.9)
    assert 0 < len(text) <= 48


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens: 0"),
        ({"temperature": -1.0}, "--temperature: -1"),
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"top_k": -1}, "--top-k: -1"),
        ({"top_p": 0.0}, r"--top-p: 0\.0"),
        ({"max_new_tokens": 48}, "leaves room for --max-new-tokens 47"),
        ({"device": "toaster"}, "--device: 'toaster'"),
    ],
)
def test_bad_settings(folder, settings, message):
    with pytest.raises(UserError, match=message):
        generate(folder, "a", **settings)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        generate(tmp_path, "a")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.safetensors"):
        generate(tmp_path, "a")
    with pytest.raises(UserError, match="is not a folder"), exported(tmp_path / "none"):
        pass


def test_a_checkpoint_is_exported_for_the_moment(run):
    with exported(run) as place:
        assert place != run
        assert (place / "config.json").is_file()
    assert not place.exists()


def test_the_command(run, folder):
    command = [sys.executable, str(ROOT / "launch" / "generate.py"), str(run), "--prompt", "mask "]
    arguments = ["--max-new-tokens", "8", "--temperature", "0", "--device", "cpu"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = generate(folder, "mask ", temperature=0, max_new_tokens=8)
    assert done.stdout == expected + "\n"
