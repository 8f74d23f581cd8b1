"""What the tests with faults did, counted for the end of the session: kills, faults, bad files."""

from collections import Counter

counts: Counter[str] = Counter()
notes: list[str] = []  # seeds, and what was not possible here


def add(what: str, many: int = 1) -> None:
    """Count `many` more of `what`."""
    counts[what] += many


def note(text: str) -> None:
    """A line for the end of the session."""
    notes.append(text)


def lines() -> list[str]:
    return [*(f"{many} {what}" for what, many in sorted(counts.items())), *notes]
