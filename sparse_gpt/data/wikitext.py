"""WikiText: rows into articles, and back from its tokenised form to plain text.

The data set keeps one line a row and blank rows as empty strings; an article begins at a
level-1 heading (" = Title = "). Raw text reproduces the lines of the original files exactly.
"""

import re
from collections.abc import Iterable, Iterator

_TITLE = re.compile(r" = (?!=).*[^=] = \n?")


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join rows (lines) into articles, each beginning with its title.

    A blank row becomes " \\n", as in the original files. A line that looks like a title counts
    as one only between two blank rows, which an equation inside an article is not. Lines before
    the first title go with the first article.
    """
    lines: list[str] = []
    title: int | None = None  # where a line that may be a title stands in `lines`
    seen_title = False
    before_blank = True
    for row in rows:
        line = row if row.strip() else " \n"
        line = line if line.endswith("\n") else line + "\n"
        blank = not line.strip()
        if title is not None and blank:
            # The blank line above a title belongs to it, as in the original files.
            start = title - 1 if title and not lines[title - 1].strip() else title
            if seen_title:
                yield "".join(lines[:start])
                lines = lines[start:]
            seen_title = True
        title = len(lines) if before_blank and _TITLE.fullmatch(line) else None
        lines.append(line)
        before_blank = blank
    if any(line.strip() for line in lines):
        yield "".join(lines)


_AROUND_AT = re.compile(r" @([-,.])@ ")
_HEADING = re.compile(r"(?m)^ ?((?:= )+)(.*?)((?: =)+) ?$")
_BEFORE = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|d|m|re|ve|ll)\b|n't\b)")
_AFTER = re.compile(r"([(\[{$£€]) ")
_QUOTED = re.compile(r'" ([^"\n]*?) "')
_SINGLE_QUOTED = re.compile(r"(?<![^\s(\"])' ([^'\n]*?) '(?=[\s,.;:!?)\"])")


def detokenise_wikitext(text: str) -> str:
    """Plain text of WikiText's tokenised form, line by line.

    Undoes " @-@ ", " @,@ " and " @.@ ", blanks before punctuation, inside brackets and inside
    paired quotation marks, split clitics ("it 's", "do n't"), blanks at the ends of lines and
    the spacing of headings (" = = Plot = = " becomes "== Plot =="). <unk> stays: what it stood
    for is lost.
    """
    text = _AROUND_AT.sub(r"\1", text)
    text = _HEADING.sub(
        lambda m: m[1].replace(" ", "") + f" {m[2].strip()} " + m[3].replace(" ", ""), text
    )
    text = _QUOTED.sub(r'"\1"', text)
    text = _SINGLE_QUOTED.sub(r"'\1'", text)
    text = _BEFORE.sub(r"\1", text)
    text = _AFTER.sub(r"\1", text)
    text = re.sub(r"(?<=\w)s ' (?=\w)", "s' ", text)  # plural possessive: "players ' union"
    text = re.sub(r"(?m)^ +| +$", "", text)
    return re.sub(r"(?<=\S) {2,}", " ", text)
