"""When a run's processes ran: one entry a start, kept up to date while they do."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json


class Sessions:
    """`sessions.json` in a run's folder: `[first, last]` seen alive, a session each (UNIX s)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sessions.json"
        self.entries: list[list[float]] = []
        if self.path.is_file():
            self.entries = _read(self.path)

    def begin(self, now: float) -> None:
        self.entries.append([now, now])
        self.seen(now)

    def seen(self, now: float) -> None:
        """The session is alive. The file is replaced as a whole, at every moment one is there."""
        self.entries[-1][1] = now
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.entries), encoding="utf-8")
        os.replace(temporary, self.path)

    @property
    def seconds(self) -> float:
        """Wall time of all sessions together."""
        return sum(last - first for first, last in self.entries)

    @property
    def started(self) -> str:
        return _iso(self.entries[0][0])

    @property
    def finished(self) -> str:
        return _iso(self.entries[-1][1])

    @property
    def resumed(self) -> int:
        """Starts after the first."""
        return len(self.entries) - 1


def _read(path: Path) -> list[list[float]]:
    try:
        entries = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove it") from None
    if not isinstance(entries, list) or not all(map(_is_session, entries)):
        raise UserError(f"{path}: no list of [first, last] times; remove it")
    return entries


def _is_session(entry: Any) -> bool:
    """Two times of this century's clocks, which can be shown as dates."""
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(isinstance(time, int | float) and 0 <= time < 1e11 for time in entry)
    )


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
