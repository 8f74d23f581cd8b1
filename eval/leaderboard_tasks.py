"""The five tasks of the Open LLM Leaderboard (v1) as lm-eval task specifications.

Prompts, splits and metrics come from the installed lm-eval; only `dataset_path` (for a mirror)
and `num_fewshot` are overridden. In particular `fewshot_split` is left alone: for HellaSwag and
Winogrande, naming it would make lm-eval draw one example fewer from its generator, and so other
examples than the stock tasks use.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eval.environment import QuietLogs
from eval.settings import nearest
from sparse_gpt.data.corpus import refuse_code, refuse_elsewhere
from sparse_gpt.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

GROUP = "sparse_gpt_leaderboard"
MMLU_GROUP = "sparse_gpt_mmlu"
SHOTS = ("leaderboard", "zero")
# Names of these settings in results. v1 is the leaderboard of 2023 to June 2024, which ran
# lm-eval's commit b281b0921b with 25, 10, 0, 5 and 5 examples; today's tasks have its prompts.
NAMES = {"leaderboard": "leaderboard_v1", "zero": "leaderboard_v1_zero_shot"}

_SUBJECT_NAMES = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
college_chemistry college_computer_science college_mathematics college_medicine college_physics
computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
high_school_european_history high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics high_school_physics
high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning
management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine
professional_psychology public_relations security_studies sociology us_foreign_policy virology
world_religions
"""
MMLU_SUBJECTS = tuple(_SUBJECT_NAMES.split())


@dataclass(frozen=True)
class LeaderboardTask:
    """One column of the table.

    tasks: lm-eval names, one but for MMLU. metric: lm-eval's name of the leaderboard's metric
    (TruthfulQA's mc2 is called `acc` there). documents, pool: how many documents the official
    evaluation split and few-shot pool have, to say when a mirror holds others. folder: where
    the data lies in a Hub-shaped mirror; configs: the names of its data configurations. version:
    lm-eval's version of the task(s), a part of `leaderboard_v1`; another one is refused.
    """

    key: str
    title: str
    tasks: tuple[str, ...]
    metric: str
    shots: int
    documents: int
    pool: int
    folder: str
    configs: tuple[str | None, ...]
    # Folder of the task in lm_eval/tasks, so that only these are indexed and not thousands.
    source: str
    version: float


TASKS: dict[str, LeaderboardTask] = {
    task.key: task
    for task in (
        LeaderboardTask(
            "arc", "ARC", ("arc_challenge",), "acc_norm", 25, 1172, 1119,
            "allenai/ai2_arc", ("ARC-Challenge",), "arc", 1.0,
        ),
        LeaderboardTask(
            "hellaswag", "HellaSwag", ("hellaswag",), "acc_norm", 10, 10042, 39905,
            "Rowan/hellaswag", (None,), "hellaswag", 1.0,
        ),
        LeaderboardTask(
            "truthfulqa", "TruthfulQA", ("truthfulqa_mc2",), "acc", 0, 817, 0,
            "truthfulqa/truthful_qa", ("multiple_choice",), "truthfulqa", 3.0,
        ),
        LeaderboardTask(
            "mmlu", "MMLU", tuple(f"mmlu_{subject}" for subject in MMLU_SUBJECTS), "acc", 5,
            14042, 285, "cais/mmlu", MMLU_SUBJECTS, "mmlu/default", 1.0,
        ),
        LeaderboardTask(
            "winogrande", "Winogrande", ("winogrande",), "acc", 5, 1267, 40398,
            "allenai/winogrande", ("winogrande_xl",), "winogrande", 1.0,
        ),
    )
}  # fmt: skip


def select(names: list[str] | None) -> list[LeaderboardTask]:
    """The chosen tasks in table order; all without names. Unknown names are a `UserError`."""
    for name in names or []:
        if name not in TASKS:
            raise nearest("task", name, list(TASKS))
    return [task for key, task in TASKS.items() if not names or key in names]


def shots_of(task: LeaderboardTask, shots: str) -> int:
    """How many examples a prompt has: the leaderboard's number, or none (paper 001's text)."""
    return task.shots if shots == "leaderboard" else 0


def check_mirror(mirror: Path, tasks: list[LeaderboardTask]) -> Path:
    """The mirror's absolute path, or a `UserError` that names the first folder missing from it."""
    if not mirror.is_dir():
        raise UserError(f"--data {mirror}: no such folder")
    for task in tasks:
        folder = mirror / task.folder
        if not folder.is_dir():
            raise UserError(
                f"--data {mirror}: {task.title} is missing: expected the folder {folder}, as "
                f"`hf download --repo-type dataset {task.folder}` leaves it"
            )
        refuse_code(folder, f"--data {mirror}: {task.title}")
        if not any(folder.rglob("*.parquet")):
            raise UserError(f"--data {mirror}: {task.title}: no parquet file under {folder}")
        refuse_elsewhere(folder, f"--data {mirror}: {task.title}")
    return mirror.resolve()


def specification(
    tasks: list[LeaderboardTask], shots: str, mirror: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """For each task key, lm-eval members of a group: task names with their overrides."""
    members: dict[str, list[dict[str, Any]]] = {}
    for task in tasks:
        override: dict[str, Any] = {"num_fewshot": shots_of(task, shots)}
        if mirror is not None:
            override["dataset_path"] = str(mirror / task.folder)
            override["dataset_kwargs"] = {"cache_dir": str(cache_folder(mirror / task.folder))}
        members[task.key] = [{"task": name, **override} for name in task.tasks]
    return members


def cache_folder(dataset: Path) -> Path:
    """Where `datasets` keeps its copy of one data set of a mirror.

    Its own cache goes by the folder's last name and its README, not by the data files: another
    mirror, or one whose files changed, would silently be answered with the old rows. So the
    copy's folder is named after the path, size and time of every file.
    """
    from datasets import config

    digest = hashlib.sha256(str(dataset).encode())
    for path in sorted(path for path in dataset.rglob("*") if path.is_file()):
        status = path.stat()
        entry = (path.relative_to(dataset).as_posix(), status.st_size, status.st_mtime_ns)
        digest.update(repr(entry).encode())
    name = f"{dataset.name}-{digest.hexdigest()[:16]}"
    return Path(config.HF_DATASETS_CACHE) / "sparse_gpt_mirrors" / name


def task_manager(tasks: list[LeaderboardTask]) -> "TaskManager":
    """lm-eval's index of the installed tasks, read from the folders of these tasks only."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_defaults=False, include_path=[root / task.source for task in tasks]
    )


def load(tasks: list[LeaderboardTask], shots: str, mirror: Path | None) -> dict[str, Any]:
    """Build the lm-eval tasks with their data: what `lm_eval.evaluator.evaluate` takes.

    Raises `UserError` where data is missing or the few-shot pool is too small.
    """
    manager = task_manager(tasks)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for task, members in zip(tasks, specification(tasks, shots, mirror).values()):
        for member, config in zip(members, task.configs):
            group = {"group": f"{GROUP}_{member['task']}", "task": [member]}
            try:
                with QuietLogs():
                    built = manager.load([group])["tasks"]
            except (OSError, ValueError, KeyError) as error:
                where = f"{mirror / task.folder}" if mirror else f"{task.folder} on the Hub"
                raise UserError(
                    f"{task.title}: cannot read {member['task']} from {where}"
                    f"{f', configuration {config}' if config else ''}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            loaded["tasks"].update(built)
            check_version(task, member["task"], built[member["task"]].VERSION)
            _check_pool(task, member, built[member["task"]])
    return loaded


def pool_size(task: Any) -> int:
    """How many documents a built lm-eval task draws its examples from; 0 without examples."""
    return len(task.sampler.df) if task.config.num_fewshot else 0


def check_version(task: LeaderboardTask, name: str, version: Any) -> None:
    """Refuse an installed lm-eval whose task is another one than `leaderboard_v1` means."""
    if version != task.version:
        raise UserError(
            f"{task.title}: the installed lm-eval has version {version} of {name}, "
            f"{NAMES['leaderboard']} means version {task.version}: install the lm-eval that "
            "pyproject.toml names"
        )


def _check_pool(task: LeaderboardTask, member: dict[str, Any], built: Any) -> None:
    # lm-eval draws one more where the pool's split has no name, to drop the question itself.
    need = member["num_fewshot"]
    if need and built.fewshot_cfg.split == built.config.test_split:
        need += 1
    if pool_size(built) < need:
        raise UserError(
            f"{task.title}: {member['task']} needs {need} few-shot documents, "
            f"{member.get('dataset_path', task.folder)} has {pool_size(built)}; "
            "use --shots zero or complete the data"
        )


def write_tasks(
    folder: Path, tasks: list[LeaderboardTask], shots: str, mirror: Path | None
) -> list[Path]:
    """Write the group files with which the stock command runs the same tasks.

    `lm_eval --model hf --model_args pretrained=FOLDER --include_path DIR --tasks
    sparse_gpt_leaderboard` then reads the installed tasks with these overrides; write again
    after changing a mirror's files. Returns the files.

    MMLU is a group of its own whose score is the plain mean over subjects, as on the
    leaderboard (lm-eval's own `mmlu` weighs subjects by size).
    """
    folder.mkdir(parents=True, exist_ok=True)
    members = specification(tasks, shots, mirror)
    top: list[Any] = []
    files = []
    for task in tasks:
        if task.key != "mmlu":
            top += members[task.key]
            continue
        top.append(MMLU_GROUP)
        mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
        group = {
            "group": MMLU_GROUP,
            "task": members[task.key],
            "aggregate_metric_list": [mean],
            "metadata": {"version": 1},
        }
        files.append(_write_yaml(folder / f"{MMLU_GROUP}.yaml", group))
    group = {"group": GROUP, "task": top, "metadata": {"version": 1, "shots": shots}}
    files.append(_write_yaml(folder / f"{GROUP}.yaml", group))
    return files


def _write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
