"""The record of one finished evaluation on the leaderboard's tasks."""

import json
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.leaderboard_stage import LeaderboardRun
from sparse_gpt.experiment.record import about_run, describe_data
from sparse_gpt.train.results import FILE as RESULTS
from sparse_gpt.train.results import read_results

KEPT = ("tasks", "average", "settings", "notes", "versions", "run_sha256", "seconds")


def leaderboard_record(run: LeaderboardRun, corpora: Corpora) -> dict[str, Any]:
    """What a finished evaluation says; all but its scores is of the run it is after.

    Raises `UserError` where a part is missing.
    """
    before = run.after
    results = read_results(before.folder / RESULTS)
    if results is None:
        raise UserError(f"{before.folder / RESULTS} is missing; the run has not ended")
    path = run.folder / f"{run.name}.leaderboard.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; the evaluation has not ended") from None
    return {
        **about_run(run, corpora, before.folder, results),
        "loss": {},
        "word_perplexity": {},
        "curve": [],
        "after_data": describe_data(before.corpora, corpora),
        "leaderboard": {key: scores[key] for key in KEPT},
    }
