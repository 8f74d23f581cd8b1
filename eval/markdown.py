"""Markdown tables and the numbers in them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with padded cells; the first column is text, the others numbers."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {line} |" for line in padded)


def percent(value: float | None, error: float | None = None, signed: bool = False) -> str:
    """A fraction in percent with one digit, as in Table 15; `-` for what was not measured."""
    if value is None:
        return "-"
    shown = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"
