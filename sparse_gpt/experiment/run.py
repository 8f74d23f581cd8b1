"""`launch/experiment.py` as a function."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sparse_gpt.durable import write_json
from sparse_gpt.errors import UserError
from sparse_gpt.experiment.estimate import Estimates
from sparse_gpt.experiment.lock import Lock
from sparse_gpt.experiment.page import write
from sparse_gpt.experiment.plan import Planner
from sparse_gpt.experiment.processes import slots_of
from sparse_gpt.experiment.record import AnyRun, Records
from sparse_gpt.experiment.runner import Runner, Stopped
from sparse_gpt.experiment.show import Show, list_runs
from sparse_gpt.experiment.spec import Experiment, load_experiment
from sparse_gpt.experiment.stages import all_runs

WORK, RESULTS = Path("runs/experiments"), Path("docs/results")


def run_experiment(
    path: Path | str,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    jobs: int | None = None,
    list_only: bool = False,
    work: Path = WORK,
    results: Path = RESULTS,
) -> int:
    """Run what of an experiment is not done yet; returns the exit code.

    `only`: arms, all of them if empty. `list_only`: show the plan and what is done. Checkpoints
    and logs go below `work`, records below `results`, each in a folder of the experiment's name.
    Raises `UserError` for bad input, and where another start works in these folders.
    """
    experiment = load_experiment(path, list(overrides))
    unknown = [arm for arm in only if arm not in experiment.arms]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no arm; arms: {', '.join(experiment.arms)}")
    work, results = work.absolute() / experiment.name, results / experiment.name
    planner, records = Planner(experiment, work), Records(results)
    slots = slots_of(experiment.ranks, jobs or experiment.jobs, experiment.launcher)
    if list_only:
        runs = _chosen(planner, only)
        why = {run.name: records.why_not_done(run, planner.corpora) for run in runs}
        print(list_runs(runs, why, _estimates(planner, records), len(slots)))
        return 0
    lock = Lock(work, [results])
    try:
        for name in experiment.data:
            planner.corpora.prepare(name, workers=sum(len(slot.cores) for slot in slots))
        planner = Planner(experiment, work)  # with the vocabulary that the data has
        runner = Runner(
            _chosen(planner, only),
            records,
            planner.corpora,
            slots,
            experiment.ranks,
            Show(_estimates(planner, records), len(slots)),
            keep=lock.descriptors,
            launcher=experiment.launcher,
        )
        describe(experiment, results, [str(path), *overrides])
        write_plan(planner, records)
        try:
            return 0 if runner.go() else 1
        finally:
            if any((results / "runs").glob("*.json")):
                write_plan(planner, records)
                print(f"page: {write(results)}", flush=True)
    except Stopped as stopped:
        print("stopped; start again to go on", flush=True)
        return 128 + stopped.args[0]
    finally:
        lock.release()


def remake_page(
    path: Path | str,
    overrides: Sequence[str] = (),
    work: Path = WORK,
    results: Path = RESULTS,
) -> None:
    """Tables, plots and page of an experiment from its records, without running anything."""
    experiment = load_experiment(path, list(overrides))
    results = results / experiment.name
    write_plan(Planner(experiment, work.absolute() / experiment.name), Records(results))
    print(f"page: {write(results)}", flush=True)


def describe(experiment: Experiment, results: Path, arguments: Sequence[str]) -> None:
    """What the page says besides the records."""
    about = {
        "title": experiment.title or experiment.name,
        "question": experiment.question,
        "baseline": experiment.baseline,
        "compare": experiment.compare,
        "command": shlex.join(["python", "launch/experiment.py", *arguments]),
    }
    write_json(results / "experiment.json", about)


def write_plan(planner: Planner, records: Records) -> None:
    """Which runs there will be, for the page; `stale`: why a record is not of the run planned."""
    keys = ("arm", "label", "seed", "stage", "group")
    plan = [
        {
            "run": run.name,
            **{key: getattr(run, key) for key in keys},
            "stale": _stale(run, planner, records),
        }
        for run in all_runs(planner)
    ]
    write_json(records.folder / "plan.json", plan)


def _stale(run: AnyRun, planner: Planner, records: Records) -> str | None:
    try:
        return records.why_not_done(run, planner.corpora) or None
    except UserError as error:  # the page names it, and shows the others
        return str(error)


def _chosen(planner: Planner, only: Sequence[str]) -> list[AnyRun]:
    return [run for run in all_runs(planner) if not only or run.arm in only]


def _estimates(planner: Planner, records: Records) -> Estimates:
    """From the runs that are done."""
    estimates = Estimates()
    for run in all_runs(planner):
        if records.why_not_done(run, planner.corpora) is None:
            estimates.learn(run, records.read(run.name) or {})
    return estimates
