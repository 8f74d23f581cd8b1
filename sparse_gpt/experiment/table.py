"""A table of text cells, as markdown and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """`key` is what a column sorts by (the text where it is None); `strong` needs a test."""

    text: str
    key: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """`numeric` columns are set to the right; `notes` stand below."""

    title: str
    header: Sequence[str]
    rows: list[list[Cell]]
    numeric: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)


def cell(value: float | None, shape: str = "{}", strong: bool = False) -> Cell:
    """A number in a format, sorted by its value; `-` for None."""
    return Cell("-") if value is None else Cell(shape.format(value), float(value), strong)


def markdown(table: Table) -> str:
    """GitHub's table, with its title and notes; what texts hold stays text."""
    header = [_plain(name) for name in table.header]
    rows = [
        [f"**{_plain(c.text)}**" if c.strong else _plain(c.text) for c in row] for row in table.rows
    ]
    rule = ["---:" if place in table.numeric else "---" for place in range(len(header))]
    lines = ["| " + " | ".join(line) + " |" for line in (header, rule, *rows)]
    notes = "".join(f"\n- {_plain(note)}" for note in table.notes)
    return (
        f"### {_plain(table.title)}\n\n" + "\n".join(lines) + "\n" + (notes + "\n" if notes else "")
    )


def _plain(text: str) -> str:
    """Text that markdown shows as it is."""
    text = " ".join(text.split())
    for letter in "\\`*_|<>[]":
        text = text.replace(letter, "&lt;" if letter == "<" else "\\" + letter)
    return text


def to_html(table: Table, identity: str) -> str:
    """A `<figure>` with the table, sortable by page.js; every text is escaped."""
    head = "".join(
        f'<th scope="col"{_side(table, place)}>{html.escape(name)}</th>'
        for place, name in enumerate(table.header)
    )
    body = "".join(
        "<tr>" + "".join(_cell(table, place, c) for place, c in enumerate(row)) + "</tr>\n"
        for row in table.rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<figure class="table" id="{html.escape(identity)}">'
        f"<figcaption>{html.escape(table.title)}</figcaption>"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</figure>\n"
    )


def _side(table: Table, place: int) -> str:
    return ' class="number"' if place in table.numeric else ""


def _cell(table: Table, place: int, content: Cell) -> str:
    key = "" if content.key is None else f' data-key="{content.key!r}"'
    text = html.escape(content.text)
    if place in table.numeric:  # broken before a spread or an interval alone
        text = text.replace(" ", "\u00a0").replace("\u00a0[", " [").replace("\u00a0±", " ±")
    return f"<td{_side(table, place)}{key}>{f'<b>{text}</b>' if content.strong else text}</td>"
