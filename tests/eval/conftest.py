"""A tiny GPT-2 folder, a tiny Hub-shaped mirror, and the commands to run on them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.leaderboard_tasks import MMLU_SUBJECTS
from eval.model_folder import TOKENIZER_FILES

ROOT = Path(__file__).resolve().parents[2]
THINGS = ["apple", "river", "stone", "lamp", "horse", "cloud", "window", "garden", "bridge"]
THINGS += ["letter", "candle", "forest"]
PLACES = ["kitchen", "valley", "market", "harbour", "school", "meadow", "station", "tower"]
POSITIONS = 512


def sentence(number: int) -> str:
    """A short sentence, different for different numbers."""
    thing, place = THINGS[number % len(THINGS)], PLACES[number // 3 % len(PLACES)]
    return f"The {thing} number {number} was carried from the {place} before noon."


def make_model(folder: Path, positions: int = POSITIONS, seed: int = 0) -> Path:
    """A random GPT-2 with a byte-level BPE tokenizer trained on the fixtures' sentences."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [sentence(number) for number in range(200)],
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, bos_token=end, unk_token=end
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=500,
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,  # far from uniform, so that choices differ clearly
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def own_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 with each layer as the one branch of a linear Parallel layer."""
    from sparse_gpt.hf import export_folder, import_folder
    from sparse_gpt.ift import Transform
    from sparse_gpt.model.flops import LAYERS

    config, parameters = import_folder(tiny_model)
    layers = [f"h.{n}.{layer}" for n in range(config.n_layer) for layer in LAYERS]
    transform = Transform("parallel", "identity", dict.fromkeys(layers, 1))
    folder = tmp_path_factory.mktemp("own") / "own"
    export_folder(
        lambda name: parameters[name.replace(".branch.0.", ".")],
        dataclasses.replace(config, transform=transform),
        folder,
        eos_id=0,
    )
    for name in (*TOKENIZER_FILES, "tokenizer_config.json"):
        if (tiny_model / name).is_file():
            shutil.copy(tiny_model / name, folder)
    return folder


def _write(folder: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """One data set: parquet files and the README that names its configurations and splits."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            pq.write_table(
                pa.Table.from_pylist(rows), folder / config / f"{split}-00000-of-00001.parquet"
            )
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "Made by a test.", ""]))


def _arc(number: int) -> dict[str, Any]:
    texts = [sentence(number + step) for step in range(4)]
    return {
        "id": str(number),
        "question": f"Which of these happened on day {number}?",
        "choices": {"text": texts, "label": list("ABCD")},
        "answerKey": "ABCD"[number % 4],
    }


def _hellaswag(number: int) -> dict[str, Any]:
    return {
        "ind": number,
        "activity_label": "Carrying things",
        "ctx_a": sentence(number),
        "ctx_b": "then the " + THINGS[number % 5],
        "endings": [sentence(number + step).lower() for step in range(1, 5)],
        "label": str(number % 4),
    }


def _truthful(number: int) -> dict[str, Any]:
    choices = [sentence(number + step) for step in range(5)]
    return {
        "question": f"What was carried on day {number}?",
        "mc1_targets": {"choices": choices, "labels": [1, 0, 0, 0, 0]},
        "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0, 0]},
    }


def _winogrande(number: int) -> dict[str, Any]:
    return {
        "sentence": f"The {THINGS[number % 7]} did not fit in the box because the _ was too large.",
        "option1": THINGS[number % 7],
        "option2": "box",
        "answer": str(1 + number % 2),
    }


def _mmlu(subject: str, number: int) -> dict[str, Any]:
    return {
        "question": f"In {subject}, what is carried on day {number}?",
        "subject": subject,
        "choices": [THINGS[(number + step) % len(THINGS)] for step in range(4)],
        "answer": number % 4,
    }


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five data sets with a few rows each; subjects have different numbers of questions."""
    hub = tmp_path_factory.mktemp("hub")
    arc = {"train": range(100, 140), "validation": range(200, 203), "test": range(6)}
    _write(
        hub / "allenai/ai2_arc",
        {"ARC-Challenge": {split: [_arc(n) for n in numbers] for split, numbers in arc.items()}},
    )
    swag = {"train": range(100, 130), "validation": range(6)}
    _write(
        hub / "Rowan/hellaswag",
        {"default": {split: [_hellaswag(n) for n in numbers] for split, numbers in swag.items()}},
    )
    _write(
        hub / "truthfulqa/truthful_qa",
        {"multiple_choice": {"validation": [_truthful(n) for n in range(6)]}},
    )
    winogrande = {"train": range(100, 120), "validation": range(8)}
    _write(
        hub / "allenai/winogrande",
        {"winogrande_xl": {s: [_winogrande(n) for n in ns] for s, ns in winogrande.items()}},
    )
    _write(
        hub / "cais/mmlu",
        {
            subject: {
                "test": [_mmlu(subject, n) for n in range(2 + number % 3)],
                "validation": [_mmlu(subject, 50)],
                "dev": [_mmlu(subject, n) for n in range(20, 25)],
            }
            for number, subject in enumerate(MMLU_SUBJECTS)
        },
    )
    return hub


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where subprocesses keep their Hugging Face caches."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what this process reads out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("datasets_cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(hf_home: Path, tmp_path: Path) -> Run:
    """Run `python eval/NAME ARGS` from a folder that is not the repository."""

    def run(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return _run([sys.executable, str(ROOT / "eval" / name), *arguments], hf_home, tmp_path)

    return run


@pytest.fixture
def stock(hf_home: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the stock `lm_eval` command on a folder and return its result file."""

    def run(model: Path, include: Path, task: str, batch_size: int, *extra: Any) -> dict[str, Any]:
        out = tmp_path / "stock"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf"]
        command += ["--model_args", f"pretrained={model}", "--include_path", str(include)]
        command += ["--tasks", task, "--device", "cpu", "--batch_size", str(batch_size)]
        done = _run([*command, "--output_path", str(out), *extra], hf_home, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = out.rglob("results_*.json")
        return json.loads(file.read_text())

    return run


def _run(command: list[Any], hf_home: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HOME": str(hf_home),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=400,
        check=False,
    )
