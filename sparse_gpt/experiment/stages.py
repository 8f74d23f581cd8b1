"""All runs of an experiment, those of later stages directly behind their pretraining."""

from collections.abc import Iterator

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.finetune_stage import finetunings
from sparse_gpt.experiment.leaderboard_stage import evaluations
from sparse_gpt.experiment.plan import Planner, Run
from sparse_gpt.experiment.record import AnyRun, LaterRun
from sparse_gpt.train.checkpoint_files import list_steps, open_checkpoint


def all_runs(planner: Planner) -> list[AnyRun]:
    """Every run of an experiment in the order in which to run them."""
    return [each for run in planner.runs() for each in (run, *_later(planner, run))]


def _later(planner: Planner, run: Run) -> Iterator[LaterRun]:
    for index, stage in enumerate(planner.experiment.stages):
        if stage.finetune is not None:
            yield from finetunings(planner, stage.finetune, f"stages.{index}.finetune", run)
        if stage.leaderboard is not None:
            yield from evaluations(planner, stage.leaderboard, run)


def weights_of(run: AnyRun) -> str | None:
    """A digest of the weights that a run starts from; None of pretraining."""
    if isinstance(run, Run):
        return None
    return open_checkpoint(run.after.folder, verify=False).identity


def has_weights(run: Run) -> bool:
    """Whether the checkpoint that a run ended with is there, for a later stage to start from."""
    folder = run.folder / "checkpoints"
    if not list_steps(folder):
        return False
    try:
        state = open_checkpoint(folder / f"step-{list_steps(folder)[-1]:08d}", verify=False)
    except UserError:  # broken: the run will say so when it is started again
        return False
    ended = state.manifest["state"]
    return state.manifest["step"] >= run.plan.steps or ended.get("finished") is True
