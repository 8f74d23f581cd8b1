"""A power cut at any moment: the order of the operations of a save, and what they leave."""

import contextlib
import random
import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.contracts.runs import run_config, trainer
from tests.faults import tally
from tests.faults.operations import watched
from tests.faults.power_cut import LOST, TORN, WHOLE, Disk, Done
from tests.faults.refusals import refusal
from tests.ranks import run_ranks

SAVES, SUBSETS, SEED = 4, 6, 5
FOLDER = "run/checkpoints"
QUIET = contextlib.nullcontext()
NAME = re.compile(r"(step|best)-\d{8}$")


def recorded(corpus, out, again=0, **changes):
    """Every operation of a rank below the folder of the run's folder, from its very start.

    `again`: saves of the last step once more. The disk confirms the name of every second one
    only at the save after it.
    """
    import torch.distributed as dist

    made_of, started, rank, refusing = [], {}, dist.get_rank(), [False]

    def before(operation):
        if refusing[0] and operation.kind == "fsync" and operation.path == FOLDER:
            raise refusal("broken", Path(operation.path))
        started[operation.number] = time.monotonic_ns()

    def after(operation):
        times = started.pop(operation.number), time.monotonic_ns()
        made_of.append(Done(operation.kind, operation.path, operation.target, *times, rank))

    settings = {"max_steps": SAVES, "checkpoint__every": 1, **changes}
    with (
        watched(Path(out).parent, before, after),
        trainer(run_config(corpus, out, **settings)) as made,
    ):
        made.fit()
        for number in range(again):
            made.state.tokens += 1
            refusing[0] = number % 2 == 0
            with pytest.raises(UserError, match="is published, but") if refusing[0] else QUIET:
                made.checkpointer.save(made.state.step, asdict(made.state))
    return made_of


def record(corpus, root, **changes):
    """The operations of both ranks, in order."""
    ranks = run_ranks(2, recorded, corpus, str(root / "run"), **changes)
    return sorted((done for rank in ranks for done in rank), key=lambda done: done.start)


@pytest.fixture(scope="module")
def operations(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("recorded")
    found = record(corpus, root, checkpoint__keep_last=1)
    open_checkpoint(root / "run")
    return found


def steps_of(operations):
    """(name, operations of its folder) of every checkpoint as it was made."""
    made = [o.path for o in operations if o.kind == "mkdir" and o.path.startswith(f"{FOLDER}/")]
    assert len(made) == SAVES
    for temporary in made:
        yield temporary, [o for o in operations if o.path.startswith(temporary)]


def test_every_file_is_on_the_disk_before_the_manifest_and_that_before_the_name(operations):
    for temporary, own in steps_of(operations):
        final = temporary.removesuffix(".tmp")
        published = next(o for o in own if o.kind == "rename" and o.target == final)
        manifest = next(o for o in own if o.kind == "write" and "manifest" in o.path)
        tensors = [o for o in own if o.kind == "write" and o.path.endswith(".safetensors")]
        assert {o.rank for o in tensors} == {0, 1}
        for write in tensors:
            synced = [o for o in own if o.kind == "fsync" and o.path == write.path]
            assert len(synced) == 1
            assert write.end <= synced[0].start and synced[0].end <= manifest.start
        for path in (f"{temporary}/manifest.json.tmp", temporary):
            synced = [o for o in own if o.kind == "fsync" and o.path == path]
            assert synced and manifest.end <= synced[-1].start
            assert synced[-1].end <= published.start
        after = [o for o in operations if o.kind == "fsync" and o.path == FOLDER]
        lasting = next(o for o in after if o.start >= published.end)
        removed = [o for o in operations if o.kind in ("unlink", "rmdir") and FOLDER in o.path]
        for old in removed:  # of the save before, or of this one
            assert old.start < own[0].start or old.start >= lasting.end


def test_the_log_is_on_the_disk_before_the_checkpoint_of_its_steps(operations):
    log = "run/metrics.jsonl"
    written = [o for o in operations if o.path == log and o.kind == "write"]
    assert len(written) >= SAVES
    for temporary, own in steps_of(operations):
        start = own[0].start
        synced = [o for o in operations if (o.kind, o.path) == ("fsync", log) and o.end <= start]
        last = max((o for o in written if o.end <= start), key=lambda o: o.end)
        assert synced and synced[-1].start >= last.end, temporary


def checkpoints_only(operations):
    """What concerns them: operations below their folder, and on the folders above it."""
    above = (".", "run")
    return [
        o
        for o in operations
        if o.path.startswith(FOLDER) or (o.path in above and o.kind in ("mkdir", "fsync"))
    ]


def judge(operations, subsets):
    """Every state that a cut may leave; returns how many there were, and how many were torn."""
    disk = Disk(checkpoints_only(operations))
    generator = random.Random(SEED)
    whole = wholes(disk)
    states = set()
    for cut in disk.moments():
        committed = [name for name, (_, lasting) in whole.items() if lasting <= cut]
        for left in disk.outcomes(cut, generator, subsets):
            there = left.folder(FOLDER) or {}
            named = {name: left.files(inode) for name, inode in there.items() if NAME.match(name)}
            for name, files in named.items():
                assert any(files == v for v in whole[name][0]), (cut, name, files)
            for tag in ("step", "best"):
                before = [name for name in committed if name.startswith(tag)]
                now = [name for name in named if name.startswith(tag)]
                assert not before or (now and max(now) >= max(before)), (cut, before, now)
            states.add(repr(sorted((n, left.files(i)) for n, i in there.items())))
    torn = sum(f"'{TORN}'" in state or f"'{LOST}'" in state for state in states)
    return len(states), torn


def wholes(disk):
    """By name: the complete contents it had, one or several, and since when the first lasts."""
    found = {}
    nothing = random.Random(0)
    end = disk.operations[-1].end + 1
    for change in disk.changes:
        name = change.new_name
        if change.done.kind in ("rename", "exchange") and NAME.match(name):
            cut = change.done.end + 1
            everything = list(disk.outcomes(cut, nothing, 0))[1]
            files = everything.files(change.inode)
            assert files and all(state == WHOLE for _, state in files.values())
            lasting = min(
                (e for s, e in disk.syncs[change.folders[0]] if s >= change.done.end), default=end
            )
            contents, since = found.get(name, ([], lasting))
            found[name] = ([*contents, files], since)
    return found


def test_no_cut_leaves_half_a_checkpoint_under_its_name_or_takes_one(operations):
    states, torn = judge(operations, SUBSETS)
    assert torn > 50  # there was something to lose
    tally.add("states of the disk after a power cut", states)


def test_no_cut_in_saves_of_the_same_step_takes_it(corpus, tmp_path):
    """Nor where the disk did not confirm that the new one has the name of the old."""
    found = record(corpus, tmp_path, again=3, checkpoint__keep_last=1, stop_at=1)
    assert sum(o.kind == "exchange" for o in found) == 3
    states, torn = judge(found, SUBSETS)
    assert torn > 50
    tally.add("states of the disk after a power cut", states)


@pytest.mark.slow
def test_no_cut_in_a_run_with_a_best_checkpoint_takes_one(corpus, tmp_path):
    found = record(
        corpus,
        tmp_path,
        checkpoint__keep_last=2,
        evaluation__every=1,
        evaluation__patience=SAVES,
        optimizer__lr=1e-3,
    )
    states, torn = judge(found, 4 * SUBSETS)
    assert torn > 50
    tally.add("states of the disk after a power cut", states)
