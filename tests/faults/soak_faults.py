"""The faults of `tests/soak.py`: each meets a living run, which then ends as it should."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from sparse_gpt.errors import EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD, EXIT_USER_ERROR
from sparse_gpt.train.checkpoint_files import list_steps, step_folder
from tests.crash.runs import RANKS, SCRIPT
from tests.launcher import Launch, run_deepspeed

END_SECONDS = 180.0
ASK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # for a stop
NOT_LOST = (0, EXIT_USER_ERROR, EXIT_STOPPED, EXIT_STOPPED_FOR_GOOD)


class Surprise(Exception):
    """The run did not end as it should."""


class Run:
    """A run that is going on: its folder and its command."""

    def __init__(self, folder: Path, launch: Launch, generator: random.Random):
        self.folder, self.launch, self.generator = folder, launch, generator
        self.checkpoints = folder / "checkpoints"

    @property
    def config(self) -> Path:
        return self.folder.parent / "config.yaml"

    def last_step(self) -> int:
        """The last one in its log; 0 where there is none."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                return json.loads(line)["step"]
        return 0

    def wait_until(self, due: float) -> bool:
        """Until that time, but not before this start has made a step; whether it ended before."""
        while self.launch.process.poll() is None:
            if time.monotonic() >= due and "train      step " in self.launch.output:
                return False
            time.sleep(0.1)
        return True

    def end(self, codes: tuple[int, ...] | None, *texts: str) -> str:
        """Wait for its end: one of these codes (None: any of a lost run), the output has a text."""
        deadline = time.monotonic() + END_SECONDS
        while self.launch.process.poll() is None or self.launch.processes():
            if time.monotonic() > deadline:
                raise Surprise(f"it did not end in {END_SECONDS:g} s")
            time.sleep(0.1)
        code = self.launch.process.returncode
        if code not in codes if codes is not None else code in NOT_LOST:
            raise Surprise(f"it ended with code {code}")
        output = self.launch.output
        if texts and not any(text in output for text in texts):
            raise Surprise(f"it did not say {texts}")
        if "Traceback" in output and code in NOT_LOST:
            raise Surprise("it showed a traceback")
        return f"exit code {code}"

    def send(self, processes: list[psutil.Process], number: int) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ranks(self) -> list[psutil.Process]:
        return list(self.launch.ranks().values())

    def one(self) -> psutil.Process:
        return self.generator.choice(self.ranks())


def kill_one(run: Run) -> str:
    run.send([run.one()], signal.SIGKILL)
    return run.end(None)


def kill_all(run: Run) -> str:
    run.send(run.ranks(), signal.SIGKILL)
    return run.end(None)


def kill_launcher(run: Run) -> str:
    """The command, or the process it starts on each node: the ranks see that, save and stop.

    Without that process the command ends with 0 at once.
    """
    whole = psutil.Process(run.launch.process.pid)
    node = psutil.Process(run.ranks()[0].ppid())
    run.send([run.generator.choice([whole, node])], signal.SIGKILL)
    codes = (-signal.SIGKILL, 256 - signal.SIGKILL, 1, 0)
    code = run.end(codes, "asked by a lost launcher")
    return f"{code}, saved at step {list_steps(run.checkpoints)[-1]}"


def choose_signal(run: Run) -> signal.Signals:
    """One that the run hears: under nohup, a SIGHUP is ignored."""
    return run.generator.choice([n for n in ASK if signal.getsignal(n) is not signal.SIG_IGN])


def signal_one(run: Run) -> str:
    number = choose_signal(run)
    run.send([run.one()], number)
    return f"{number.name}, {run.end((EXIT_STOPPED,), f'asked by {number.name} (1 of 2 ranks)')}"


def signal_all(run: Run) -> str:
    number = choose_signal(run)
    run.send(run.ranks(), number)
    return f"{number.name}, {run.end((EXIT_STOPPED,), f'asked by {number.name}')}"


def stop_file(run: Run) -> str:
    stop = run.folder / "STOP"
    stop.touch()
    try:
        return run.end((EXIT_STOPPED_FOR_GOOD,), "the file STOP")
    finally:
        stop.unlink()


def freeze(run: Run) -> str:
    """Until the other rank sees that it gives no sign of life."""
    run.send([run.one()], signal.SIGSTOP)
    return run.end(None, "has given no sign of life", "has not answered")


def in_save(run: Run, what: str, codes: tuple[int, ...] | None, *texts: str) -> str:
    fault = run.folder.parent / "fault"
    rank = run.generator.randrange(RANKS)
    number = run.generator.randint(1, (15, 40)[rank == 0])  # rank 0 removes old ones, too
    temporary = fault.with_name("fault.tmp")
    temporary.write_text(f"{what}:{rank}:{number}")
    os.replace(temporary, fault)
    try:
        ended = run.end(codes, *texts)
    finally:
        fault.unlink(missing_ok=True)
    places = [line for line in run.launch.output.splitlines() if line.startswith("FAULT")]
    return f"{''.join(places).removeprefix('FAULT ')} of rank {rank}, {ended}"


def kill_in_save(run: Run) -> str:
    return in_save(run, "kill", None)


def hang_in_save(run: Run) -> str:
    return in_save(run, "hang", None, "has made no headway")


def disk_in_save(run: Run) -> str:
    """Full, read-only, or gone, which it then is not any more."""
    what, away = run.generator.choice(["full", "read-only", "gone"]), run.folder / "away"
    try:
        said = in_save(run, what, (EXIT_USER_ERROR,), f"checkpoint folder {run.checkpoints}")
    finally:
        if away.exists():
            away.rename(run.checkpoints)
    return said


def damage(run: Run) -> str:
    """To a file of the newest checkpoint: refused by name, and moved away as the message advises.

    A flipped bit, bytes that are missing, the whole file missing, or that of an older checkpoint.
    """
    run.send(run.ranks(), signal.SIGKILL)
    run.end(None)
    steps = list_steps(run.checkpoints)
    if not steps:
        return "there was no checkpoint yet"
    newest = run.checkpoints / step_folder(steps[-1])
    tensors = sorted(path for path in newest.iterdir() if path.suffix != ".json")
    kind = run.generator.choice(["flipped bit", "cut short", "missing", "of an older step"])
    if kind == "flipped bit":
        victim = run.generator.choice(sorted(newest.iterdir()))
        victim.write_bytes(flipped(victim.read_bytes(), run.generator))
    else:
        victim = run.generator.choice(tensors)
        older = run.checkpoints / step_folder(steps[0]) / victim.name
        if kind == "of an older step" and older.read_bytes() != victim.read_bytes():
            shutil.copyfile(older, victim)
        elif kind == "missing":
            victim.unlink()
        else:
            kind = "cut short"
            os.truncate(victim, run.generator.randrange(victim.stat().st_size))
    result = run_deepspeed(SCRIPT, [run.config], RANKS)
    said = [line for line in result.stdout.splitlines() if "error: " in line]
    if result.returncode != EXIT_USER_ERROR or not said or victim.name not in said[0]:
        raise Surprise(f"{victim}, {kind}, was not refused, code {result.returncode}: {said}")
    shutil.rmtree(newest)
    return f"{newest.name}/{victim.name}, {kind}: refused, exit code {result.returncode}"


def flipped(good: bytes, generator: random.Random) -> bytes:
    bad = good
    while bad.lower() == good.lower():  # 1e-05 as 1E-05 in the manifest is no damage
        changed = bytearray(good)
        changed[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        bad = bytes(changed)
    return bad


FAULTS: dict[str, Callable[[Run], str]] = {
    "kill -9 of one rank": kill_one,
    "kill -9 of all ranks": kill_all,
    "kill -9 of the launcher": kill_launcher,
    "signal to one rank": signal_one,
    "signal to all ranks": signal_all,
    "STOP file": stop_file,
    "frozen rank": freeze,
    "kill -9 in a save": kill_in_save,
    "hang in a save": hang_in_save,
    "disk full, read-only or gone in a save": disk_in_save,
    "damaged checkpoint": damage,
}
