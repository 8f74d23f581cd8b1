"""The folder of a run's checkpoints: what is published there, replaced and removed. Rank 0's.

At every moment, also after a kill or a power cut in it, whatever is named `step-N` or `best-N` is
complete: a checkpoint in the making, and one on its way out, is called `*.tmp`. A name reaches
the disk before anything that depends on it, and the new checkpoint before an old one goes.
"""

import shutil
from pathlib import Path

from sparse_gpt.durable import exchange, fsync_path, make_folder
from sparse_gpt.errors import UserError
from sparse_gpt.train.checkpoint_files import CheckpointReader, list_steps, step_folder

RETIRED = ".old.tmp"
REPLACED = ".replaced.tmp"  # put back where its successor did not come


class CheckpointFolder:
    """Made when first needed; from then on it has to stay where it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._was_there = False

    def ready(self) -> None:
        """Make the folder, or see that it is still there; clear what a killed save left in it.

        `UserError` where it has gone meanwhile: made anew, it would be on another disk.
        """
        if self._was_there and not self.path.is_dir():
            raise UserError(
                "it was there before and is gone (a file system that is not mounted any more?); "
                "bring it back with the checkpoints in it, then start the run again"
            )
        make_folder(self.path)
        self._was_there = True
        self._put_back()
        self._remove(list(self.path.glob("*.tmp")))

    def newest(self, tag: str) -> Path | None:
        """The newest published checkpoint of a tag."""
        if not self.path.is_dir():
            return None
        self._was_there = True
        self._put_back()
        steps = list_steps(self.path, tag)
        return self.path / step_folder(steps[-1], tag) if steps else None

    def publish(self, temporary: Path, final: Path) -> Path | None:
        """Give a written checkpoint its name. Returns what had that name before, for `retire`.

        A step is done again after a rollback, or where the checkpoint of a tag is later than the
        one a run goes on from. Nothing is changed where an `OSError` or `UserError` is raised.
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
            except OSError:
                self._put_back()
                raise
        fsync_path(self.path)
        return replaced

    def retire(self, newest: Path, replaced: Path | None, keep_last: int) -> None:
        """Once `newest` is published: remove what it replaced, and older ones of its tag.

        A tag names one checkpoint, the one saved last; steps stay for `keep_last` of them.
        """
        tag = newest.name.split("-")[0]
        others = [self.path / step_folder(step, tag) for step in list_steps(self.path, tag)]
        stale = others[:-keep_last] if tag == "step" else others
        retired = [replaced] if replaced is not None else []
        for folder in stale:
            if folder != newest:
                retired.append(folder.with_name(folder.name + RETIRED))
                folder.rename(retired[-1])
        self._remove(retired)

    def remove(self, tag: str) -> None:
        """Remove all checkpoints of a tag."""
        retired = []
        for step in list_steps(self.path, tag):
            folder = self.path / step_folder(step, tag)
            retired.append(folder.with_name(folder.name + RETIRED))
            folder.rename(retired[-1])
        self._remove(retired)

    def _put_back(self) -> None:
        for replaced in self.path.glob(f"*{REPLACED}"):
            final = replaced.with_name(replaced.name.removesuffix(REPLACED))
            if not final.exists():
                replaced.rename(final)
                fsync_path(self.path)

    def _remove(self, folders: list[Path]) -> None:
        if folders:
            # The names they had must be gone from the disk before their files are.
            fsync_path(self.path)
        for folder in folders:
            shutil.rmtree(folder)
