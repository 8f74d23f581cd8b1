"""When a run's processes ran: one entry a start, kept up to date while they do."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path


class Sessions:
    """`sessions.json` in a run's folder: `[first, last]` seen alive, a session each (UNIX s)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sessions.json"
        self.entries: list[list[float]] = []
        if self.path.is_file():
            self.entries = json.loads(self.path.read_text(encoding="utf-8"))

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


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
