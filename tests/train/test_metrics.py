"""The log of a run: one clean curve, whatever was killed; rank 0 alone."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest

from sparse_gpt.config import LoggingConfig
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import LONGEST_LINE
from sparse_gpt.train.metrics import Metrics
from tests.ranks import ROOT


def metrics(folder, active=True, **config):
    return Metrics(folder, LoggingConfig(**config), "name", 10, active)


def write(folder, steps, start=0):
    log = metrics(folder)
    log.start(start)
    for step in steps:
        log.log("train", step, {"loss": step / 4, "mfu_active": None})
    log.close()
    log.close()  # twice is harmless


def steps_in(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_later_lines_of_an_ended_session_are_dropped(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 7), start=4)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_half_written_line_is_dropped(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    write(tmp_path, [3], start=2)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert not path.with_suffix(".tmp").exists()


def test_what_no_line_can_be_is_dropped_without_reading_it_into_memory(tmp_path):
    """Such as the hole of a power cut; the lines around it stay."""
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    hole = bytes(3 * LONGEST_LINE) + b"\n"
    path.write_bytes(b"".join([first, hole, b'{"step": "\xff"}\n', *others]))
    write(tmp_path, [4], start=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_log_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: it is no regular file; move it away"):
        metrics(tmp_path).start(0)


class Disk:
    """A file on a disk that has room for so many bytes, and none for more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("at", ["the next line", "the next save", "the end"])
def test_lines_that_a_full_disk_did_not_take_come_once_there_is_room(tmp_path, capsys, at):
    """Whole and in order, also where the first of them was taken in part."""
    log = metrics(tmp_path)
    log.start(0)
    log.log("train", 1, {"loss": 1.0})
    log._file = disk = Disk(log._file, room=20)
    for step in (2, 3, 4):
        log.log("train", step, {"loss": 1.0})
    assert capsys.readouterr().out.count("its lines wait until the next save") == 1
    with pytest.raises(OSError, match="No space left"):
        log.sync()  # no checkpoint without them
    written = (tmp_path / "metrics.jsonl").read_bytes()
    assert written.count(b"\n") == 1 and not written.endswith(b"\n")
    disk.room = 10**6
    steps = [1, 2, 3, 4]
    if at == "the next line":
        log.log("train", 5, {"loss": 1.0})
        steps.append(5)
    elif at == "the next save":
        log.sync()
    else:
        log.close()
    assert steps_in(tmp_path) == steps
    log.close()
    assert steps_in(tmp_path) == steps


@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_was_removed_or_replaced_is_whole_at_the_next_save(tmp_path, capsys, replaced):
    """Its lines went to a file without a name; what was put in its place is kept beside it."""
    log = metrics(tmp_path)
    log.start(0)
    log.log("train", 1, {"loss": 1.0})
    log.path.unlink()
    if replaced:
        log.path.write_text("of someone else")
    log.log("train", 2, {"loss": 1.0})
    log.sync()
    assert steps_in(tmp_path) == [1, 2]
    assert capsys.readouterr().out.count("was removed or replaced; it is written again") == 1
    beside = tmp_path / "metrics.jsonl.replaced"
    assert beside.exists() == replaced and (not replaced or "else" in beside.read_text())
    log.log("train", 3, {"loss": 1.0})
    log.sync()
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3]
    assert "warning" not in capsys.readouterr().out


def test_a_log_that_was_removed_before_a_rollback_keeps_its_lines_and_reports(tmp_path):
    log = metrics(tmp_path)
    log.start(0)
    for step in (1, 2):
        log.log("train", step, {"loss": 1.0})
    log.log("nonfinite", 2, {"found": "a bad loss"})
    log.path.unlink()
    assert log.rewind(1) == [{"step": 2, "found": "a bad loss"}]
    log.log("train", 2, {"loss": 1.0})
    log.close()
    assert steps_in(tmp_path) == [1, 2]


def test_a_log_that_cannot_be_written_again_is_an_error_that_costs_no_line(tmp_path):
    """The whole folder is gone, and comes back."""
    run = tmp_path / "run"
    run.mkdir()
    log = metrics(run)
    log.start(0)
    log.log("train", 1, {"loss": 1.0})
    run.rename(tmp_path / "away")
    with pytest.raises(OSError, match="No such file"):
        log.sync()
    log.log("train", 2, {"loss": 1.0})
    (tmp_path / "away").rename(run)
    log.sync()
    log.close()
    assert steps_in(run) == [1, 2]


def test_a_log_that_has_gone_between_two_starts_is_told(tmp_path, capsys):
    write(tmp_path, range(1, 4))
    write(tmp_path, [4], start=3)
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").unlink()
    log = metrics(tmp_path, every=4)
    log.start(4)
    log.close()
    said = capsys.readouterr().out
    assert f"{tmp_path}/metrics.jsonl is gone or empty: the log begins after step 4" in said
    log.start(3)  # there may have been no line yet
    assert capsys.readouterr().out == ""
    log.close()


def test_starting_anew_empties_the_log(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, [1], start=0)
    assert steps_in(tmp_path) == [1]


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    log = metrics(tmp_path)
    log.start(0)
    log.log("train", 1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1e-3})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"kind": "train", "step": 1, "loss": "nan", "grad_norm": "inf", "lr": 1e-3}


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = metrics(tmp_path, active=False)
    log.start(0)
    log.say("hello")
    log.advance(1)
    log.log("train", 1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    write(tmp_path, [3])
    assert capsys.readouterr().out.splitlines() == ["train      step 3/10  loss 0.7500"]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_terminal_that_is_lost_stops_no_log(tmp_path, monkeypatch):
    ours, terminal = os.openpty()
    screen = open(terminal, "w")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, "stdout", screen)
    log = metrics(tmp_path)
    log.start(0)
    os.close(ours)
    log.advance(1)
    log.log("train", 1, {"loss": 1.0})
    log.close()
    with contextlib.suppress(OSError):
        screen.close()
    assert steps_in(tmp_path) == [1]


LOGGING = """
import sys, time
from pathlib import Path
from sparse_gpt.config import LoggingConfig
from sparse_gpt.train.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), LoggingConfig(), "run", 3, True)
metrics.start(0)
metrics.say("begun")
sys.stdin.readline()
for step in (1, 2, 3):
    metrics.log("train", step, {"loss": 1.0})
print("more")
metrics.close()
"""


def test_a_reader_that_is_gone_stops_no_log(tmp_path):
    """As after Ctrl-C in `deepspeed ... | tee`: the log goes on, and so does the run."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", LOGGING, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = metrics(tmp_path, wandb=True)
    with pytest.raises(UserError, match=r"logging\.wandb.*pip install"):
        log.start(0)
    log.close()
