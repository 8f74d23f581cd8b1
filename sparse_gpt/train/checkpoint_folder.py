"""The folder of a run's checkpoints: what is published there, replaced and removed. Rank 0's.

At every moment, also after a kill or a power cut in it, whatever is named `step-N` or `best-N` is
complete: a checkpoint in the making, and one on its way out, is called `*.tmp`. A name reaches
the disk before anything that depends on it, and the new checkpoint before an old one goes.

What is on its way out and cannot be removed (a file that another program has open on NFS, a
folder without write permission) ends no run: it is said once, and tried again at the next save.
"""

import contextlib
import itertools
import logging
import shutil
import uuid
from pathlib import Path

from sparse_gpt.durable import exchange, fsync_path, make_folder, write_bytes
from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import CheckpointReader, list_steps, step_folder

log = logging.getLogger(__name__)

RETIRED = ".old.tmp"
REPLACED = ".replaced.tmp"  # put back where its successor did not come
ID = ".id"  # in the folder: what tells it from the empty one of a disk that is not mounted


class Unconfirmed(UserError):
    """A checkpoint has its name, but the disk did not confirm it: a power cut may undo that."""


def id_of(path: Path) -> bytes | None:
    """What tells a folder of checkpoints from every other; None where there is none."""
    try:
        return (path / ID).read_bytes()
    except FileNotFoundError:
        return None


class CheckpointFolder:
    """Made when first needed; from then on it has to stay where it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._id: bytes | None = None
        self._warned = False

    def ready(self) -> None:
        """Make the folder, or see that it is still there; clear what a killed save left in it.

        `UserError` where it has gone meanwhile: made anew, it would be on another disk.
        """
        self._check()
        if self._id is None:
            make_folder(self.path)
            self._id = id_of(self.path)
            if self._id is None:
                self._id = uuid.uuid4().hex.encode()
                write_bytes(self.path / ID, self._id)
        self._put_back()
        self._remove(list(self.path.glob("*.tmp")))

    def _check(self) -> None:
        if self._id is None or (now := id_of(self.path)) == self._id:
            return
        if now is None and any(self.path.glob("*/manifest.json")):  # someone removed the id alone
            write_bytes(self.path / ID, self._id)
        else:
            raise UserError(
                "it was there before and is gone (a file system that is not mounted any more?); "
                "bring it back with the checkpoints in it, then start the run again"
            )

    def newest(self, tag: str) -> Path | None:
        """The newest published checkpoint of a tag; `UserError` as `ready`."""
        self._check()
        if not self.path.is_dir():
            return None
        self._put_back()
        steps = list_steps(self.path, tag)
        return self.path / step_folder(steps[-1], tag) if steps else None

    def publish(self, temporary: Path, final: Path) -> Path | None:
        """Give a written checkpoint its name. Returns what had that name before, for `retire`.

        A step is done again after a rollback, or where the checkpoint of a tag is later than the
        one a run goes on from. After an `OSError` or `UserError` no name stands for anything else
        than before, with one exception: after `Unconfirmed` the new checkpoint has its name, and
        what had it before is kept.
        """
        CheckpointReader(temporary)  # every file of every rank can be seen from here, whole
        replaced = None
        if final.exists():
            try:
                exchange(temporary, final)
                replaced = temporary
            except OSError:  # not on this file system
                replaced = final.with_name(final.name + REPLACED)
                final.rename(replaced)
        if replaced != temporary:
            try:
                temporary.rename(final)
            except OSError as problem:
                with contextlib.suppress(OSError):
                    self._put_back()
                if replaced is not None and not final.exists():
                    raise UserError(
                        f"{problem}; {replaced.name} is {final.name}, and the next start gives it "
                        "that name again"
                    ) from None
                raise
        try:
            fsync_path(self.path)
        except OSError as problem:
            raise Unconfirmed(self._not_confirmed(final, replaced, problem)) from None
        return replaced

    def _not_confirmed(self, final: Path, replaced: Path | None, problem: OSError) -> str:
        """What to say; keeps `replaced` where it gets its name back if that is free again."""
        kept = final.with_name(final.name + REPLACED)
        if replaced is not None and replaced != kept:
            try:
                replaced.rename(kept)
            except OSError:
                kept = replaced
        before = "" if replaced is None else f", what it replaces is kept as {kept.name}"
        return (
            f"{final.name} is published, but the disk did not confirm its name: {problem}. A power "
            f"cut may undo that; no older checkpoint was removed{before}. See to the disk, and "
            "start the run again"
        )

    def retire(
        self, newest: Path, replaced: Path | None, keep_last: int, superseded: str = ""
    ) -> None:
        """Once `newest` is published: remove what it replaced, and older ones of its tag.

        A tag names one checkpoint, the one saved last; steps stay for `keep_last` of them. With it
        go all of a tag that it has `superseded`.
        """
        tag = newest.name.split("-")[0]
        try:
            others = self._all(tag)
            stale = (others[:-keep_last] if tag == "step" else others) + self._all(superseded)
        except OSError as problem:
            self._warn(problem)
            return
        retired = [replaced] if replaced is not None else []
        self._remove([*retired, *(folder for folder in stale if folder != newest)])

    def _all(self, tag: str) -> list[Path]:
        return [self.path / step_folder(step, tag) for step in list_steps(self.path, tag)]

    def remove(self, tag: str) -> None:
        """Take their names from all checkpoints of a tag, or raise; then remove them."""
        self._remove([self._aside(folder) for folder in self._all(tag)])

    def _put_back(self) -> None:
        for replaced in self.path.glob(f"*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if not final.exists():
                replaced.rename(final)
                fsync_path(self.path)

    def _remove(self, folders: list[Path]) -> None:
        problems: list[OSError] = []
        retired: list[Path] = []
        for folder in folders:
            try:
                retired.append(self._aside(folder))
            except OSError as problem:
                problems.append(problem)
        try:
            if retired:
                # The names they had must be gone from the disk before their files are.
                fsync_path(self.path)
        except OSError as problem:
            problems.append(problem)
            retired = []
        for folder in retired:
            try:
                shutil.rmtree(folder)
            except OSError as problem:
                problems.append(problem)
        if problems:
            self._warn(problems[0])

    def _warn(self, problem: OSError) -> None:
        if not self._warned:
            log.warning(
                "checkpoint folder %s: what is not needed any more cannot all be removed: %s; the "
                "run goes on, and each save tries again",
                self.path,
                problem,
            )
        self._warned = True

    def _aside(self, folder: Path) -> Path:
        """Give it a name of what is on its way out: half removed, it must never get another."""
        if folder.name.endswith(RETIRED):
            return folder
        stem = folder.name.removesuffix(".tmp")
        names = (f"{stem}.{number}{RETIRED}" for number in itertools.count())
        free = next(name for name in names if not folder.with_name(name).exists())
        return folder.rename(folder.with_name(free))
