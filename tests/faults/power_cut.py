"""A disk that loses power: what of a recorded series of operations may be left on it.

As POSIX has it, and as hard as it may be: data is on the disk once its file is fsynced, a name
(made, moved, removed) once its folder is. Whatever else happened before the cut is there or not,
each for itself and in any order; data may be there in part.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

WHOLE, TORN, LOST = "whole", "torn", "lost"


@dataclass(frozen=True)
class Done:
    """One operation as it was made; times of one clock for all processes."""

    kind: str
    path: str
    target: str
    start: int
    end: int
    rank: int


@dataclass(frozen=True)
class _Change:
    """An operation by what it acts on, not by names: these change."""

    done: Done
    folders: tuple[int, ...] = ()  # whose fsync makes it lasting
    inode: int = 0
    name: str = ""
    other: int = 0  # of an exchange
    new_name: str = ""


@dataclass
class Disk:
    """The operations of all processes below one folder, which itself is there to stay."""

    operations: list[Done]
    changes: list[_Change] = field(default_factory=list)
    syncs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by inode

    def __post_init__(self) -> None:
        self.operations.sort(key=lambda done: done.start)
        tree: dict[int, dict[str, int]] = {0: {}}
        names: dict[str, int] = {".": 0}
        for done in self.operations:
            self._add(done, tree, names)

    def _add(self, done: Done, tree: dict[int, dict[str, int]], names: dict[str, int]) -> None:
        path = PurePath(done.path)
        if done.kind == "fsync":
            self.syncs.setdefault(names[done.path], []).append((done.start, done.end))
            return
        if done.kind == "write":
            self.changes.append(_Change(done, inode=names[done.path]))
            return
        parent, name = names[str(path.parent)], path.name
        if done.kind in ("create", "mkdir"):
            inode = len(tree)
            tree[inode] = {}
            names[done.path] = inode
            self.changes.append(_Change(done, (parent,), inode, name))
        elif done.kind in ("unlink", "rmdir"):
            self.changes.append(_Change(done, (parent,), names.pop(done.path), name))
        else:
            target = PurePath(done.target)
            assert target.parent == path.parent, f"{done} moves to another folder"
            other = names.get(done.target, -1)
            inode = names[done.path]
            below = {k: v for k, v in names.items() if PurePath(k).is_relative_to(path)}
            beyond = {k: v for k, v in names.items() if PurePath(k).is_relative_to(target)}
            for key in (*below, *beyond):
                del names[key]
            for key, found in below.items():
                names[str(target / PurePath(key).relative_to(path))] = found
            if done.kind == "exchange":
                for key, found in beyond.items():
                    names[str(path / PurePath(key).relative_to(target))] = found
            self.changes.append(_Change(done, (parent,), inode, name, other, target.name))

    def moments(self) -> list[int]:
        """Times of possible cuts: inside every operation and behind it."""
        return sorted({t for done in self.operations for t in (done.start + 1, done.end)})

    def _lasting(self, change: _Change, cut: int) -> bool:
        held = change.folders or (change.inode,)
        return any(
            change.done.end <= start and end <= cut
            for inode in held
            for start, end in self.syncs.get(inode, [])
        )

    def outcomes(self, cut: int, generator: random.Random, subsets: int) -> Iterator["Left"]:
        """What a cut at that time may leave: extremes, each pending change alone, and `subsets`."""
        before = [c for c in self.changes if c.done.start < cut]
        pending = [c for c in before if not self._lasting(c, cut)]
        choices: list[tuple[set[int], str]] = [(set(), LOST)]
        every = {id(c) for c in pending}
        choices += [(every, data) for data in (WHOLE, TORN, LOST)]
        for change in pending:
            choices += [(every - {id(change)}, WHOLE), ({id(change)}, WHOLE)]
        for _ in range(subsets if pending else 0):
            some = {id(c) for c in pending if generator.random() < 0.5}
            choices.append((some, generator.choice((WHOLE, TORN, LOST))))
        for kept, data in choices:
            yield self._replay(before, every, kept, data)

    def _replay(
        self, before: list[_Change], pending: set[int], kept: set[int], data: str
    ) -> "Left":
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, str] = {}
        for change in before:
            is_pending = id(change) in pending
            if not change.folders:  # a write
                there = WHOLE if not is_pending else data if id(change) in kept else LOST
                contents[change.inode] = there
                continue
            if is_pending and id(change) not in kept:
                continue
            folder = names.setdefault(change.folders[0], {})
            if change.done.kind in ("create", "mkdir"):
                folder[change.name] = change.inode
            elif change.done.kind in ("unlink", "rmdir"):
                folder.pop(change.name, None)
            else:
                if folder.get(change.name) == change.inode:
                    del folder[change.name]
                folder[change.new_name] = change.inode
                if change.done.kind == "exchange":
                    folder[change.name] = change.other
        return Left(names, contents)


@dataclass(frozen=True)
class Left:
    """A disk after a cut: names by folder, and how much is there of each file."""

    names: dict[int, dict[str, int]]
    contents: dict[int, str]

    def folder(self, path: str) -> dict[str, int] | None:
        """Names in a folder; None where it is not there."""
        inode = 0
        for part in PurePath(path).parts:
            found = self.names.get(inode, {}).get(part)
            if found is None:
                return None
            inode = found
        return self.names.get(inode, {})

    def files(self, inode: int) -> dict[str, tuple[int, str]]:
        """Of a folder of files: the inode and how much is there of each."""
        names = self.names.get(inode, {})
        return {name: (file, self.contents.get(file, LOST)) for name, file in names.items()}
