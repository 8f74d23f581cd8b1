"""A long run that meets a random fault about every minute, and loses nothing.

    python tests/soak.py --minutes 60 --out docs/results/soak.json

Trains a tiny model with dropout and RigL on 2 ranks (CPU, ZeRO 2), starts it again after every
fault, and ends it at a save once the time is over. Then compares every number of its log and every
file of that checkpoint with those of an undisturbed run to the same step, which takes about two
thirds as long again. Exit code 0 where all are equal.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.train.checkpoint_files import list_steps
from tests.crash.runs import RANKS, SCRIPT, curve, digests, write_config
from tests.faults.soak_faults import FAULTS, Run, Surprise, stop_file
from tests.launcher import start_deepspeed
from tests.tiny import write_corpus

STEPS = 1_000_000  # of both runs' schedules: more than the time is enough for
PROBE_SECONDS = 12.0
SAVE_SECONDS = 4.0  # between two saves, about


def configure(folder: Path, corpus: Path, every: int) -> Path:
    return write_config(
        folder,
        corpus,
        max_steps=STEPS,
        sparsity={"sparsity": 0.75, "algorithm": "rigl", "update": {"freq": 10}},
        checkpoint={"every": every, "keep_last": 4},
        evaluation={"every": 5 * every, "sequences": 8},
        timeouts={"silence": 10.0, "progress": 20.0},
    )


def measure_pace(folder: Path, corpus: Path) -> float:
    """Steps a second of a run left alone."""
    config = configure(folder, corpus, STEPS)
    with start_deepspeed(SCRIPT, [config], RANKS) as launch:
        launch.wait_for_output("train      step 20/")
        run = Run(folder / "run", launch, random.Random(0))
        began = time.monotonic()
        first = run.last_step()
        time.sleep(PROBE_SECONDS)
        return (run.last_step() - first) / (time.monotonic() - began)


class Soak:
    """The disturbed run: its starts, its faults, and what went otherwise than it should."""

    def __init__(
        self, folder: Path, config: Path, every: int, seed: int, seconds: float, interval: float
    ):
        self.folder, self.config, self.every = folder, config, every
        self.generator = random.Random(seed)
        self.seconds, self.interval = seconds, interval
        self.began = time.monotonic()
        self.starts = 0
        self.faults: Counter[str] = Counter()
        self.surprises: list[str] = []
        self._kinds: list[str] = []

    def run(self) -> int:
        """Faults until the time is over, then an end at a save; the step of that save."""
        due = time.monotonic() + self._pause()
        while True:
            self.starts += 1
            environment = {"SAVE_FAULT": str(self.folder / "fault")}
            script = "tests/faults/driver.py"
            with start_deepspeed(script, [self.config], RANKS, environment) as launch:
                run = Run(self.folder / "run", launch, self.generator)
                if not self._time_is_left():
                    return end_after(run, self.every * (run.last_step() // self.every + 2))
                if run.wait_until(due):
                    self._surprised("without a fault", launch)
                    continue
                self._inject(self._next_kind(), run)
            due = time.monotonic() + self._pause()

    def _time_is_left(self) -> bool:
        return time.monotonic() - self.began < self.seconds

    def _pause(self) -> float:
        return self.interval * self.generator.uniform(0.4, 1.2)

    def _next_kind(self) -> str:
        """Every kind once, in random order, before any comes again."""
        if not self._kinds:
            self._kinds = list(FAULTS)
            self.generator.shuffle(self._kinds)
        return self._kinds.pop()

    def _inject(self, name: str, run: Run) -> None:
        step, outcome = run.last_step(), "as it should"
        try:
            detail = FAULTS[name](run)
        except Surprise as surprise:
            detail = outcome = str(surprise)
            self._surprised(name, run.launch, detail)
        self.faults[name] += 1
        minutes = (time.monotonic() - self.began) / 60
        print(f"{minutes:6.1f} min  step {step}  {name}: {detail}  ({outcome})", flush=True)

    def _surprised(self, name: str, launch: Any, detail: str = "") -> None:
        text = f"{name}: {detail} exit code {launch.process.poll()}\n{launch.output[-2000:]}"
        self.surprises.append(text)
        print(f"not expected: {text}", flush=True)
        if len(self.surprises) > 20:
            raise SystemExit("too many surprises")


def end_after(run: Run, step: int) -> int:
    """End a run once it has saved that step, which is returned."""
    while step not in list_steps(run.checkpoints):
        if run.launch.process.poll() is not None:
            raise SystemExit(f"ended before step {step}:\n{run.launch.output[-3000:]}")
        time.sleep(0.1)
    stop_file(run)
    return step


def compare(run: Path, other: Path, steps: int) -> dict[str, Any]:
    """Every number of both logs up to a step, and every file of both its checkpoints."""
    mine, theirs = (
        {key: numbers for key, numbers in curve(one).items() if key[1] <= steps}
        for one in (run, other)
    )
    losses = [key for key in theirs if key[0] in ("train", "validation")]
    missing = [str(key) for key in sorted(mine.keys() ^ theirs.keys())]
    both = mine.keys() & theirs.keys()
    files, others = digests(run, steps), digests(other, steps)
    differing = sorted(name for name in files.keys() | others.keys()
                       if files.get(name) != others.get(name))  # fmt: skip
    return {
        "losses_compared": len(losses),
        "topology_updates_compared": sum(key[0] == "topology" for key in theirs),
        "numbers_that_differ": sum(mine[key] != theirs[key] for key in both),
        "largest_difference_of_a_loss": max(
            (abs(mine[key][0] - theirs[key][0]) for key in losses if key in both), default=0.0
        ),
        "lines_of_one_run_alone": missing[:20],
        "files_of_the_checkpoint": len(files),
        "files_that_differ": differing,
    }


def soak(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    corpus = write_corpus(work / "corpus", 300, 6)
    pace = measure_pace(work / "probe", corpus)
    every = max(1, round(pace * SAVE_SECONDS))
    print(f"{pace:.1f} steps/s, a save every {every}", flush=True)
    disturbed = work / "disturbed"
    config = configure(disturbed, corpus, every)
    seconds = 60 * arguments.minutes
    made = Soak(disturbed, config, every, arguments.seed, seconds, arguments.interval)
    steps = made.run()
    minutes = (time.monotonic() - made.began) / 60
    print(f"{minutes:6.1f} min  ended after step {steps}; now the undisturbed run", flush=True)
    began, whole = time.monotonic(), work / "whole"
    with start_deepspeed(SCRIPT, [configure(whole, corpus, every)], RANKS) as launch:
        end_after(Run(whole / "run", launch, random.Random(0)), steps)
    compared = compare(disturbed / "run", whole / "run", steps)
    equal = not (
        compared["numbers_that_differ"]
        or compared["lines_of_one_run_alone"]
        or compared["files_that_differ"]
    )
    return {
        "verdict": "equal" if equal and not made.surprises else "different",
        "seed": arguments.seed,
        "minutes": round(minutes, 1),
        "minutes_of_the_undisturbed_run": round((time.monotonic() - began) / 60, 1),
        "ranks": RANKS,
        "steps": steps,
        "steps_between_saves": every,
        "faults": sum(made.faults.values()),
        "faults_by_kind": dict(sorted(made.faults.items())),
        "restarts": made.starts - 1,
        **compared,
        "not_expected": made.surprises,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of the run that meets faults")
    parser.add_argument("--out", type=Path, help="where the summary goes, as JSON")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--interval", type=float, default=60, help="seconds between faults, about")
    parser.add_argument("--work", type=Path, help="keep both runs in this (new) folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what ends the ranks
    work = arguments.work or Path(tempfile.mkdtemp(prefix="soak_"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        summary = soak(arguments, work)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    text = json.dumps(summary, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0 if summary["verdict"] == "equal" else 1


if __name__ == "__main__":
    sys.exit(main())
