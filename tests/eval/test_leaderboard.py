"""Scores against the stock lm_eval command and against HFLM; truncation; bad input."""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval import leaderboard, leaderboard_result, leaderboard_tasks
from eval.leaderboard_run import evaluate_folders
from eval.leaderboard_tasks import MMLU_SUBJECTS, TASKS
from eval.model_folder import open_folders
from sparse_gpt.errors import UserError

pytestmark = [
    # datasets and multiprocess warn about forks in a process with threads; no fork is used here.
    pytest.mark.filterwarnings(
        "ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"
    ),
]


def assert_same_as_stock(result: dict[str, Any], stock: dict[str, Any]) -> None:
    """Every metric and standard error of every lm-eval task.

    Accuracies are counts, so they are equal; mc2 is made of probabilities, which differ in the
    last bits of a float32 sum.
    """
    compared = 0
    for key, column in result["tasks"].items():
        entries = (
            {f"mmlu_{subject}": entry for subject, entry in column["subjects"].items()}
            if key == "mmlu"
            else {column["tasks"][0]: column}
        )
        for name, entry in entries.items():
            values = stock["results"][name]
            for metric, value in entry["metrics"].items():
                stocks = values[f"{metric},none"]
                if name != "truthfulqa_mc2":
                    assert stocks == value, (name, metric)
                assert stocks == pytest.approx(value, abs=1e-6), (name, metric)
                compared += 1
            assert stock["n-shot"][name] == entry["shots"]
            assert stock["n-samples"][name]["effective"] == entry["documents"]
            assert stock["versions"][name] == entry["version"]
    mmlu = stock["results"][leaderboard_tasks.MMLU_GROUP]
    assert mmlu["acc,none"] == pytest.approx(result["tasks"]["mmlu"]["score"], abs=1e-12)
    assert mmlu["acc_stderr,none"] == pytest.approx(result["tasks"]["mmlu"]["stderr"], abs=1e-12)
    # A value and an error each: 57 subjects, two metrics of ARC and HellaSwag, one of the others.
    assert compared == 2 * (57 + 2 + 2 + 1 + 1)
    assert stock["config"]["random_seed"] == result["settings"]["seeds"]["random"]
    assert stock["config"]["numpy_seed"] == result["settings"]["seeds"]["numpy"]
    assert stock["config"]["torch_seed"] == result["settings"]["seeds"]["torch"]
    assert stock["config"]["fewshot_seed"] == result["settings"]["seeds"]["fewshot"]


def test_same_numbers_as_the_stock_command(
    tiny_model: Path, tiny_hub: Path, tmp_path: Path, script: Any, stock: Any
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(tiny_model, twin)
    made = {
        "sparsity": 0.75,
        "config": {"sparsity": {"algorithm": "set"}, "ift": {"member": "wide"}},
    }
    (twin / "sparse_gpt.json").write_text(json.dumps(made))
    tasks = tmp_path / "tasks"
    done = script(
        "leaderboard.py", tiny_model, f"twin={twin}", "--data", tiny_hub, "--batch-size", "4",
        "--out", tmp_path / "out", "--write-tasks", tasks, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((tmp_path / "out" / "tiny.leaderboard.json").read_text())
    second = json.loads((tmp_path / "out" / "twin.leaderboard.json").read_text())

    assert first["tasks"] == second["tasks"], "the first model left something behind"
    assert second["model"]["sparse_gpt"] == made
    table = (tmp_path / "out" / "leaderboard.md").read_text()
    assert table.strip() == done.stdout.split("\n", 1)[1].strip()
    assert re.search(r"\| twin +\| +sparse wide +\| +75\.0% +\| +set +\| +leaderboard", table)
    assert "Difference to tiny" in table
    shares = [column["truncated_share"] for column in first["tasks"].values()]
    assert min(shares) == 0.0 and max(shares) == 1.0, "want both kinds of tasks in this test"

    assert_same_as_stock(first, stock(tiny_model, tasks, leaderboard_tasks.GROUP, 4))


@pytest.mark.slow
def test_same_numbers_as_the_stock_command_on_real_data(
    tiny_model: Path, hub: Path, tmp_path: Path, script: Any, stock: Any
) -> None:
    tasks = tmp_path / "tasks"
    done = script(
        "leaderboard.py", tiny_model, "--data", hub, "--limit", "2", "--batch-size", "4",
        "--out", tmp_path / "out", "--write-tasks", tasks, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "tiny.leaderboard.json").read_text())
    assert result["tasks"]["mmlu"]["documents"] == 2 * 57
    assert result["tasks"]["mmlu"]["documents_available"] == 14042
    assert "HellaSwag: the data has 10,000 documents, the official set 10,042" in result["notes"]
    extra = ("--limit", "2")
    assert_same_as_stock(result, stock(tiny_model, tasks, leaderboard_tasks.GROUP, 4, *extra))


def prompts(loaded: dict[str, Any], limit: int) -> dict[str, list[tuple[str, str]]]:
    """The (context, continuation) pairs that lm-eval would score, by task."""
    from eval.harness import SEEDS

    built = {}
    for name, task in loaded["tasks"].items():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        task.build_all_requests(limit=limit)
        built[name] = [instance.args for instance in task.instances]
    return built


# Of the prompts below; they change where lm-eval changes a task, whatever version it names.
PROMPTS = {
    "arc_challenge": "cd2c33f6c40e",
    "hellaswag": "fa660613aa47",
    "truthfulqa_mc2": "0781ac9a96ef",
    "winogrande": "48b60779640a",
    "mmlu_anatomy": "80ea407da428",
    "mmlu_virology": "ce543373684c",
}


def test_prompts_are_the_stock_tasks_prompts(
    tiny_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untouched tasks, their Hub names led to the mirror, against our mirror tasks."""
    import datasets

    subjects = ("anatomy", "virology")
    chosen = leaderboard_tasks.select(["arc", "hellaswag", "truthfulqa", "winogrande", "mmlu"])
    load = datasets.load_dataset
    asked = []

    def from_mirror(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append(path)
        return load(path if Path(path).is_absolute() else str(tiny_hub / path), name, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_mirror)
    names = [n for t in chosen for n in t.tasks if t.key != "mmlu"]
    names += [f"mmlu_{subject}" for subject in subjects]
    manager = leaderboard_tasks.task_manager(chosen)
    untouched = manager.load(names)
    shots = {name: task.shots for task in chosen for name in task.tasks}
    for name, task in untouched["tasks"].items():
        if shots[name]:
            task.set_config(key="num_fewshot", value=shots[name])
    assert all(not Path(path).is_absolute() for path in asked)

    members = leaderboard_tasks.specification(chosen, "leaderboard", tiny_hub)
    flat = [member for group in members.values() for member in group if member["task"] in names]
    ours = manager.load([{"group": "ours", "task": flat}])
    expected, got = prompts(untouched, 4), prompts(ours, 4)
    assert got == expected
    digests = {
        name: hashlib.sha256(repr(pairs).encode()).hexdigest()[:12] for name, pairs in got.items()
    }
    assert digests == PROMPTS, "the installed lm-eval builds other prompts than leaderboard_v1"
    for name, task in ours["tasks"].items():
        (column,) = [task for task in TASKS.values() if name in task.tasks]
        assert column.version == task.VERSION
    assert got["arc_challenge"][0][0].count("Question:") == 26
    assert got["mmlu_anatomy"][0][0].count("Answer:") == 6


def open_tiny(folder: Path, **options: Any) -> Any:
    from eval.harness import open_model

    (opened,) = open_folders([str(folder)])
    return open_model(opened, device="cpu", dtype="auto", batch_size=4, **options)


def requests_of_lengths(lengths: list[tuple[int, int]], task: str) -> tuple[list[Any], list[Any]]:
    """Requests whose tokens are given, so that the length is exactly what is asked."""
    from types import SimpleNamespace

    tokens = [
        (("c", "a"), [1 + n] * context, [2 + n] * answer)
        for n, (context, answer) in enumerate(lengths)
    ]
    return [SimpleNamespace(task_name=task) for _ in lengths], tokens


def test_truncated_requests_are_those_hflm_cuts(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """HFLM warns for each request it cuts; that count is the oracle, also at the exact limit."""
    model = open_tiny(tiny_model, scorer="stock")
    longest = model.max_length
    lengths = [
        (longest - 5, 4),
        (longest - 5, 6),
        (longest - 5, 7),
        (longest + 40, 3),
        (1, longest),
    ]
    instances, tokens = requests_of_lengths(lengths, "arc_challenge")
    model._names = [instance.task_name for instance in instances]
    with caplog.at_level(logging.WARNING, logger="lm_eval.models.huggingface"):
        model._loglikelihood_tokens(tokens, disable_tqdm=True)
    cut = [record for record in caplog.records if "Truncating" in record.getMessage()]
    assert len(cut) == 2
    assert (model.requests["arc_challenge"], model.truncated["arc_challenge"]) == (5, 2)


def test_an_answer_longer_than_the_context_is_refused(tiny_model: Path) -> None:
    model = open_tiny(tiny_model)
    instances, tokens = requests_of_lengths([(4, 513)], "hellaswag")
    model._names = [instance.task_name for instance in instances]
    with pytest.raises(UserError, match=r"hellaswag: an answer has 513 tokens.* 512"):
        model._loglikelihood_tokens(tokens, disable_tqdm=True)


def test_subset_zero_shot_without_bootstrap(
    tiny_model: Path, tiny_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mc2's standard error is that of a mean: no bootstrap may run."""
    import lm_eval.api.metrics

    def refuse(*_: Any, **__: Any) -> float:
        raise AssertionError("bootstrap")

    monkeypatch.setattr(lm_eval.api.metrics, "bootstrap_stderr", refuse)
    chosen = leaderboard_tasks.select(["winogrande", "truthfulqa"])
    (result,) = evaluate_folders(
        open_folders([str(tiny_model)]), chosen, shots="zero", mirror=tiny_hub, limit=5,
        device="cpu",
    )  # fmt: skip
    assert list(result["tasks"]) == ["truthfulqa", "winogrande"]
    assert result["average"] is None
    winogrande = result["tasks"]["winogrande"]
    assert (winogrande["shots"], winogrande["documents"]) == (0, 5)
    assert winogrande["few_shot_pool"] == winogrande["few_shot_pool_official"] == 0
    p = winogrande["score"]
    assert winogrande["stderr"] == pytest.approx((p * (1 - p) / 4) ** 0.5)
    assert 0 < result["tasks"]["truthfulqa"]["stderr"] < 1


def test_the_average_is_that_of_the_leaderboard() -> None:
    """Table 15's first row: the plain mean of the five columns is its last one."""
    row = {"arc": 20.8, "hellaswag": 27.2, "truthfulqa": 47.0, "mmlu": 24.6, "winogrande": 49.4}
    average = leaderboard_result.average({k: {"score": v, "stderr": 2.0} for k, v in row.items()})
    assert average is not None
    assert f"{average['score']:.1f}" == "33.8"
    assert average["stderr"] == pytest.approx(2.0 / 5**0.5)
    assert leaderboard_result.average({"arc": {"score": 1.0, "stderr": None}}) is None
    assert leaderboard_result.mean_of([(0.5, 0.1), (0.7, None)]) == (pytest.approx(0.6), None)


def test_tasks_are_the_leaderboards() -> None:
    assert {key: (task.shots, task.metric) for key, task in TASKS.items()} == {
        "arc": (25, "acc_norm"),
        "hellaswag": (10, "acc_norm"),
        "truthfulqa": (0, "acc"),
        "mmlu": (5, "acc"),
        "winogrande": (5, "acc"),
    }
    assert {key: task.version for key, task in TASKS.items()} == {
        "arc": 1.0, "hellaswag": 1.0, "truthfulqa": 3.0, "mmlu": 1.0, "winogrande": 1.0,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"version 2.0 of hellaswag, leaderboard_v1 means .* 1.0"):
        leaderboard_tasks.check_version(TASKS["hellaswag"], "hellaswag", 2.0)
    manager = leaderboard_tasks.task_manager(list(TASKS.values()))
    installed = {name for name in manager.all_subtasks if name.startswith("mmlu_")}
    assert installed == {f"mmlu_{subject}" for subject in MMLU_SUBJECTS}


def test_bad_input(tiny_model: Path, tiny_hub: Path, tmp_path: Path) -> None:
    model = str(tiny_model)
    empty = tmp_path / "empty"
    empty.mkdir()
    partial = tmp_path / "partial"
    (partial / "allenai").mkdir(parents=True)
    shutil.copytree(tiny_hub / "allenai/ai2_arc", partial / "allenai/ai2_arc")
    cases = [
        ([str(empty)], "has no config.json"),
        ([model, "--limit", "0"], "--limit must be at least 1, got 0"),
        ([model, "--batch-size", "-1"], "--batch-size must be at least 1"),
        ([model, "--tasks", "hellaswagg"], "did you mean 'hellaswag'"),
        ([model, "--data", str(tmp_path / "nowhere")], "--data .*nowhere: no such folder"),
        ([model, "--data", str(partial)], f"expected the folder {partial}/Rowan/hellaswag"),
        ([], "at least one model folder"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            leaderboard.main(arguments)


def test_missing_parts_of_a_data_set_are_named(tiny_hub: Path, tmp_path: Path) -> None:
    broken = tmp_path / "hub"
    shutil.copytree(tiny_hub, broken)
    shutil.rmtree(broken / "cais/mmlu/virology")
    (broken / "allenai/winogrande/winogrande_xl/train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"MMLU: cannot read mmlu_virology from .*cais/mmlu"):
        leaderboard_tasks.load(leaderboard_tasks.select(["mmlu"]), "leaderboard", broken)
    with pytest.raises(UserError, match=r"Winogrande: cannot read winogrande from"):
        leaderboard_tasks.load(leaderboard_tasks.select(["winogrande"]), "leaderboard", broken)


def _one_set(tmp_path: Path) -> Path:
    """A mirror with TruthfulQA alone, of one row."""
    from tests.eval.conftest import _write

    folder = tmp_path / "hub" / "truthfulqa" / "truthful_qa"
    row = {"question": "q", "mc1_targets": {"choices": ["a"], "labels": [1]}}
    _write(folder, {"multiple_choice": {"validation": [row]}})
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["truthful_qa.py", "multiple_choice/x.pyc", "a/weights.pkl"])
def test_a_mirror_with_code_is_refused(tmp_path: Path, name: str) -> None:
    hub, ran = _one_set(tmp_path), tmp_path / "ran"
    script = hub / "truthfulqa" / "truthful_qa" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    with pytest.raises(UserError, match=rf"--data .*TruthfulQA holds .*\({name}\)"):
        leaderboard_tasks.check_mirror(hub, leaderboard_tasks.select(["truthfulqa"]))
    assert not ran.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"data_files": "../../secret.parquet"},
        {"data_files": ["data/*", "/etc/hostname"]},
        {"data_files": [{"split": "validation", "path": ["https://example.org/x.parquet"]}]},
        {"data_files": "*.parquet", "data_dir": ".."},
    ],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_mirror_that_takes_files_from_elsewhere_is_refused(
    tmp_path: Path, entry: dict[str, Any], name: str
) -> None:
    chosen = leaderboard_tasks.select(["truthfulqa"])
    hub = _one_set(tmp_path)
    assert leaderboard_tasks.check_mirror(hub, chosen) == hub
    fence = "---\n" if name == "README.md" else ""
    described = json.dumps([{"config_name": "multiple_choice", **entry}])
    card = hub / "truthfulqa" / "truthful_qa" / name
    card.write_text(f"{fence}configs: {described}\n{fence}")
    with pytest.raises(UserError, match=rf"TruthfulQA: .*/{name} takes files from"):
        leaderboard_tasks.check_mirror(hub, chosen)


def test_a_mirror_described_by_a_bomb_is_refused_at_once(tmp_path: Path) -> None:
    hub = _one_set(tmp_path)
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    described = "\n".join(
        ["---", *lines, "configs: [*a59, {data_files: /etc/hostname}]", "---", ""]
    )
    (hub / "truthfulqa" / "truthful_qa" / "README.md").write_text(described)
    with pytest.raises(UserError, match="takes files from /etc/hostname"):
        leaderboard_tasks.check_mirror(hub, leaderboard_tasks.select(["truthfulqa"]))


def test_a_changed_mirror_is_read_again(tiny_hub: Path, tmp_path: Path) -> None:
    """Two mirrors of one README, and one whose file changed: `datasets` alone mixes them up."""
    from tests.eval.conftest import _truthful, _write

    hub = tmp_path / "hub"
    chosen = leaderboard_tasks.select(["truthfulqa"])
    sizes = []
    for mirror, count in ((tiny_hub, None), (hub, 3), (hub, 2)):
        if count is not None:
            rows = [_truthful(number) for number in range(count)]
            _write(mirror / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})
        loaded = leaderboard_tasks.load(chosen, "leaderboard", mirror)
        sizes.append(len(loaded["tasks"]["truthfulqa_mc2"].eval_docs))
    assert sizes == [6, 3, 2]


def test_a_pool_that_is_too_small_is_refused(tiny_hub: Path, tmp_path: Path) -> None:
    """Winogrande draws six to use five, so five documents are not enough."""
    from tests.eval.conftest import _winogrande, _write

    small = tmp_path / "hub"
    rows = [_winogrande(number) for number in range(5)]
    _write(small / "allenai/winogrande", {"winogrande_xl": {"train": rows, "validation": rows}})
    chosen = leaderboard_tasks.select(["winogrande"])
    with pytest.raises(UserError, match=r"needs 6 few-shot documents, .* has 5; use --shots zero"):
        leaderboard_tasks.load(chosen, "leaderboard", small)
    leaderboard_tasks.load(chosen, "zero", small)
