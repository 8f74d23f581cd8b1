"""The continuation task: what items are, that they never change, and stock lm_eval's numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval import local_task
from eval.local_task import Design, build_items
from eval.model_folder import open_folders
from sparse_gpt.errors import UserError
from tests.eval.conftest import sentence


def book(number: int) -> str:
    """Thirty lines of six sentences."""
    lines = [
        " ".join(sentence(n + 40 * line + 1000 * number) for n in range(6)) for line in range(30)
    ]
    return "\n".join(lines)


TEXTS = [book(number) for number in range(3)]
DESIGN = Design(items=25, context_words=12, answer_words=5)


def test_items_hold_the_text_as_it_is() -> None:
    items = build_items(TEXTS, DESIGN)
    assert len(items) == 25
    assert [(i.document, i.word) for i in items] == sorted((i.document, i.word) for i in items)
    assert len({(item.document, item.word) for item in items}) == 25
    for item in items:
        truth = item.choices[item.answer]
        assert f"{item.context} {truth}" in TEXTS[item.document]
        assert TEXTS[item.document].split()[item.word : item.word + 5] == truth.split()
        assert len(item.context.split()) == 12
        assert len(set(item.choices)) == 4
        assert all(len(choice.split()) == 5 for choice in item.choices)
        assert all(any(choice in text for text in TEXTS) for choice in item.choices)
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert any("\n" in item.context for item in items)


def test_items_depend_on_text_and_design_only() -> None:
    items = build_items(TEXTS, DESIGN)
    assert items == build_items(iter(TEXTS), DESIGN)
    assert items != build_items(TEXTS, Design(items=25, context_words=12, answer_words=5, seed=1))
    # A fixed point: a change of the recipe must be seen, since it changes published numbers.
    first = [(item.document, item.word, item.answer) for item in items[:3]]
    assert first == [(0, 250, 3), (0, 267, 3), (0, 624, 3)]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"--items 25: the text has only \d+ places"):
        build_items([TEXTS[0][:800]], DESIGN)
    same = " ".join(["word"] * 2000)
    with pytest.raises(UserError, match="fewer than 4 different continuations"):
        build_items([same], DESIGN)


def test_same_numbers_as_the_stock_command(
    tiny_model: Path, tmp_path: Path, script: Any, stock: Any
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text(TEXTS[0])
    out = tmp_path / "out"
    done = script(
        "local_task.py", tiny_model, "--text", text, "--items", "30", "--batch-size", "4",
        "--context-words", "12", "--answer-words", "5", "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "tiny.continuation.json").read_text())
    task = result["tasks"]["continuation"]
    assert task["documents"] == 30 and task["requests"] == 120
    assert done.stdout == (out / "continuation.md").read_text()
    values = stock(tiny_model, out / "task", local_task.TASK, 4)["results"][local_task.TASK]
    assert set(task["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    for metric, value in task["metrics"].items():
        assert values[f"{metric},none"] == value


def test_a_model_that_knows_the_text_beats_chance(tiny_model: Path, tmp_path: Path) -> None:
    """Trained for a moment on the text itself, the tiny model finds most continuations."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.from_pretrained(tiny_model, initializer_range=0.02)
    model: Any = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor(tokenizer.encode(TEXTS[0]))
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = tmp_path / "trained"
    model.save_pretrained(trained)
    tokenizer.save_pretrained(trained)

    design = Design(items=60, context_words=12, answer_words=5)
    local_task.write_task(tmp_path / "task", build_items([TEXTS[0]], design))
    folders = open_folders([str(tiny_model), str(trained)])
    random, learned = local_task.evaluate_folders(folders, tmp_path / "task", design, device="cpu")
    assert learned["tasks"]["continuation"]["score"] > 0.5
    assert learned["tasks"]["continuation"]["score"] > random["tasks"]["continuation"]["score"]

    # The same task folder written again with other items is read anew, not from a cache.
    local_task.write_task(tmp_path / "task", build_items([TEXTS[0]], DESIGN))
    (again,) = local_task.evaluate_folders(folders[:1], tmp_path / "task", DESIGN, device="cpu")
    assert again["tasks"]["continuation"]["documents"] == 25


def test_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    text = tmp_path / "held_out.txt"
    text.write_text(TEXTS[0])
    strange = tmp_path / "held_out.doc"
    strange.write_text("text")
    cases = [
        ([model], "--text is missing"),
        ([model, "--text", str(tmp_path / "no.txt")], "--text .*no.txt does not exist"),
        ([model, "--text", str(strange)], "known kinds are .txt"),
        ([model, "--text", str(text), "--items", "0"], "--items must be at least 1, got 0"),
        ([model, "--text", str(text), "--choices", "1"], "--choices must be at least 2"),
        ([str(tmp_path), "--text", str(text)], "has no config.json"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            local_task.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
