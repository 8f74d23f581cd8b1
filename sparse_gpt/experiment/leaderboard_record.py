"""The record of one finished evaluation on the leaderboard's tasks."""

from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.leaderboard_stage import LeaderboardRun
from sparse_gpt.experiment.record import about_run, describe_data
from sparse_gpt.json_file import read_object
from sparse_gpt.train.results import FILE as RESULTS
from sparse_gpt.train.results import read_results

KEPT = ("tasks", "average", "settings", "notes", "versions", "run_sha256", "seconds")
LARGEST = 64 << 20  # bytes; what each of 14,000 questions scored is some 100 kB


def leaderboard_record(run: LeaderboardRun, corpora: Corpora) -> dict[str, Any]:
    """What a finished evaluation says; all but its scores is of the run it is after.

    Raises `UserError` where a part is missing.
    """
    before = run.after
    results = read_results(before.folder / RESULTS)
    if results is None:
        raise UserError(f"{before.folder / RESULTS} is missing; the run has not ended")
    scores = read_scores(run.folder / f"{run.name}.leaderboard.json")
    return {
        **about_run(run, corpora, before.folder, results),
        "loss": {},
        "word_perplexity": {},
        "curve": [],
        "after_data": describe_data(before.corpora, corpora),
        "leaderboard": scores,
    }


def read_scores(path: Path) -> dict[str, Any]:
    """What a record keeps of a finished evaluation."""
    try:
        scores = read_object(path, LARGEST)
        return {key: scores[key] for key in KEPT}
    except KeyError as error:
        raise UserError(f"{path}: no evaluation of the leaderboard: it lacks {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; the evaluation has not ended") from None
