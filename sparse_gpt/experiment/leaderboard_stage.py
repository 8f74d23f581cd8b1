"""The leaderboard as a stage of an experiment: what was trained is exported, and evaluated."""

from dataclasses import dataclass
from pathlib import Path

from sparse_gpt.experiment.corpora import expanded
from sparse_gpt.experiment.follow_up import FollowUp
from sparse_gpt.experiment.plan import Planner, Run
from sparse_gpt.experiment.spec import LeaderboardStage


@dataclass(frozen=True)
class Documents:
    """What an evaluation takes is not known before it has counted its documents."""

    steps: int = 0
    tokens: int = 0
    flops_total: int = 0
    masked_flops_total: int = 0


@dataclass(frozen=True)
class LeaderboardRun(FollowUp):
    """The evaluation of what the run `after` ended with."""

    config: LeaderboardStage
    folder: Path
    plan: Documents = Documents()
    corpora: tuple[str, ...] = ()
    stage: str = "leaderboard"
    match: None = None

    @property
    def name(self) -> str:
        """`<arm>-s<seed>-leaderboard`; of files and folders."""
        return f"{self.after.name}-leaderboard"

    @property
    def row(self) -> str:
        """What runs that differ in the seed alone have in common."""
        return f"{self.arm}, leaderboard"

    def metric_folders(self) -> list[Path]:
        """It logs no metrics."""
        return []

    def arguments(self, config: Path) -> list[str]:
        """Of eval/leaderboard.py, which exports a run's folder first; `config` is to look at."""
        stage = self.config
        given = [f"{self.name}={self.after.folder}", "--out", str(self.folder)]
        given += ["--shots", stage.shots, "--device", stage.device, "--dtype", stage.dtype]
        given += ["--batch-size", str(stage.batch_size)]
        if stage.data is not None:
            given += ["--data", expanded(stage.data, "stages.leaderboard.data")]
        if stage.tasks is not None:
            given += ["--tasks", *stage.tasks]
        return given + ([] if stage.limit is None else ["--limit", str(stage.limit)])


def evaluations(planner: Planner, stage: LeaderboardStage, run: Run) -> list[LeaderboardRun]:
    """The evaluation of a pretraining run, if its arm is among the stage's."""
    chosen = run.group == "main" if stage.arms is None else run.arm in stage.arms
    folder = run.folder.with_name(f"{run.name}-leaderboard")
    return [LeaderboardRun(run, stage, folder)] if chosen else []
