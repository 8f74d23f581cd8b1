"""From a folder of records to `runs.csv`, `tables.md`, plots, and a page that needs no network."""

import base64
import hashlib
import html
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from sparse_gpt.durable import write_bytes, write_text
from sparse_gpt.experiment.arms import Comparison, comparisons
from sparse_gpt.experiment.checks import git_revision, warnings
from sparse_gpt.experiment.drawing import Drawn, drawn
from sparse_gpt.experiment.paper_tables import finetuning, paper_tables
from sparse_gpt.experiment.plots import common_plots
from sparse_gpt.experiment.results import Record, Results, read
from sparse_gpt.experiment.special_plots import shape_table, special_plots
from sparse_gpt.experiment.table import Table, markdown, to_html
from sparse_gpt.experiment.tables import arm_tables, comparison_table, ranges, run_table, runs_csv
from sparse_gpt.experiment.verdict import answer, sentence

METHOD = (
    "The unit is a run: its loss over the whole held-out split. Runs with the same seed saw the "
    "same data in the same order, so arms are compared on common seeds by a two-sided paired t "
    "test; intervals are 95 % t intervals of the mean difference and are not corrected. p values "
    "are corrected over all comparisons of the experiment by Holm's method, and a difference is "
    "called one below 0.05. A test of few seeds misses small differences: “not told apart” is not "
    "“equal”."
)


def write(results_folder: Path) -> Path:
    """Write everything that is made from the records of a results folder; returns `index.html`.

    Writes `runs.csv`, `tables.md`, `index.html` and one PNG a plot. An unfinished experiment gets
    a page of what is there. Raises `UserError` where the folder holds neither records nor a plan.
    """
    results = read(results_folder)
    found = comparisons(results)
    tables = made_tables(results, found)
    plots = [drawn(plot) for plot in (*common_plots(results, found), *special_plots(results))]
    write_text(results_folder / "runs.csv", runs_csv(results))
    write_text(results_folder / "tables.md", tables_markdown(results, found, tables))
    for picture in plots:
        write_bytes(results_folder / f"{picture.plot.name}.png", picture.png)
    page = results_folder / "index.html"
    write_text(page, render(results, found, tables, plots))
    return page


def made_tables(results: Results, found: Sequence[Comparison]) -> dict[str, list[Table]]:
    """By section of the page."""
    extra = [shape_table(results), finetuning(results)]
    return {
        "Results": [*arm_tables(results, found), *filter(None, extra)],
        "Comparisons": [comparison_table(found)] if found else [],
        "The papers' tables": paper_tables(results),
    }


def tables_markdown(
    results: Results, found: Sequence[Comparison], tables: dict[str, list[Table]]
) -> str:
    """The answer and the tables, for a README."""
    title = Table(results.about.title or results.name, [], [])
    parts = [markdown(title).splitlines()[0].removeprefix("##")]
    parts += answer(results, found)
    parts += [markdown(table).rstrip("\n") for group in tables.values() for table in group]
    return "\n\n".join(parts) + "\n"


def render(
    results: Results,
    found: Sequence[Comparison],
    tables: dict[str, list[Table]],
    plots: Sequence[Drawn],
) -> str:
    """The page. Every text of a record is escaped; nothing is loaded from anywhere."""
    style, script = _asset("page.css"), _asset("page.js")
    title = html.escape(results.about.title or results.name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src '{_digest(style)}'; script-src '{_digest(script)}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{_paragraph(results.about.question, "question")}
</header>
<main>
{_answer(answer(results, found))}
{_paragraph(_status(results), "status")}
{_warnings(warnings(results))}
{_section("Results", [_html_tables(tables["Results"]), _figures(plots)])}
{_section("Comparisons", [_sentences(found), _html_tables(tables["Comparisons"])])}
{_section("The papers' tables", [_html_tables(tables["The papers' tables"])])}
{_section("How it was run", [_how(results), _paragraph(METHOD, "notes")])}
{_section("Runs", [_runs(results)])}
</main>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("sparse_gpt.experiment").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What a content security policy knows an inline style or script by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _paragraph(text: str | None, kind: str = "") -> str:
    if not text:
        return ""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{html.escape(text)}</p>\n"


def _answer(sentences: Sequence[str]) -> str:
    body = "".join(_paragraph(sentence) for sentence in sentences)
    return f'<section class="answer" id="answer">{body}</section>'


def _section(title: str, parts: Sequence[str]) -> str:
    """A section; none without content."""
    body = "".join(parts)
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _html_tables(tables: Sequence[Table]) -> str:
    names = (quote(table.title.lower().replace(" ", "-"), safe="") for table in tables)
    return "".join(to_html(table, name) for table, name in zip(tables, names))


def _figures(plots: Sequence[Drawn]) -> str:
    return "".join(
        f'<figure class="plot" id="plot-{picture.plot.name}">'
        f"<figcaption>{html.escape(picture.plot.title)}</figcaption><div><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img alt="{html.escape(picture.plot.text)}" src="{_data_uri(picture.light)}">'
        f"</picture></div>{_paragraph(picture.plot.text)}</figure>\n"
        for picture in plots
    )


def _data_uri(svg: str) -> str:
    body = base64.b64encode(svg.encode()).decode()
    return f"data:image/svg+xml;base64,{body}"


def _warnings(found: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in found)
    return f'<section class="warnings"><h2>Beware</h2><ul>{items}</ul></section>' if found else ""


def _sentences(found: Sequence[Comparison]) -> str:
    items = "".join(f"<li>{html.escape(sentence(c))}</li>\n" for c in found)
    return f'<ul class="findings">{items}</ul>' if found else ""


def _status(results: Results) -> str:
    """How much of the experiment is there."""
    there = len(results.records)
    if results.plan is None:
        return f"{there} finished run{'' if there == 1 else 's'}."
    done = len(results.plan) - len(results.missing)
    if not results.missing:
        return f"All {len(results.plan)} planned runs are there."
    return f"{done} of {len(results.plan)} planned runs are there."


def _how(results: Results) -> str:
    records = results.records
    seconds = math.fsum(record.seconds or 0 for record in records)
    spent = math.fsum(record.flops.spent for record in records if record.flops)
    tokens = sum(record.tokens or 0 for record in records)
    dates = sorted(d for r in records for d in (r.started, r.finished) if d)
    rows = [
        ("Command", results.about.command, True),
        ("Experiment", results.name, True),
        ("Seeds", ranges(list({r.seed for r in records})), False),
        ("Data", _join(text for record in records for text in _data(record)), False),
        ("Trained", f"{tokens:,} tokens, {spent:.3e} FLOPs in all runs" if records else "", False),
        (
            "Time",
            f"{seconds / 3600:.1f} hours of runs, one after another" if seconds else "",
            False,
        ),
        ("When", f"{dates[0]} to {dates[-1]}" if dates else "", False),
        (
            "Resumed",
            f"{sum(r.resumed or 0 for r in records)} times in all" if records else "",
            False,
        ),
        ("Git revision", _join(git_revision(record) for record in records), True),
        ("Versions", _join(_versions(record) for record in records), False),
        ("Device", _join(_device(record) for record in records), False),
    ]
    items = "".join(
        f"<dt>{name}</dt><dd>{f'<code>{html.escape(v)}</code>' if code else html.escape(v)}</dd>\n"
        for name, v, code in rows
        if v
    )
    return f"<dl>\n{items}</dl>\n"


def _join(texts: Iterable[str]) -> str:
    """Each text once."""
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _data(record: Record) -> list[str]:
    """One text a data set; what a record says of it in other words is shown as it is."""
    found = []
    for name, entry in record.data.items():
        tokens = entry.get("tokens") if isinstance(entry, dict) else None
        if isinstance(tokens, dict):
            counts = ", ".join(
                f"{count:,} {split}" if isinstance(count, int) else f"{count} {split}"
                for split, count in tokens.items()
            )
            found.append(f"{name}: tokens {counts}; vocabulary {entry.get('vocab_size')}")
        else:
            found.append(f"{name}: {entry}")
    return found


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))


def _device(record: Record) -> str:
    ranks = f", {record.ranks} rank{'' if record.ranks == 1 else 's'}" if record.ranks else ""
    threads = f", {record.threads} thread{'' if record.threads == 1 else 's'}"
    name = record.device if isinstance(record.device, str) else str(record.device or "")
    return f"{name}{ranks}{threads if record.threads else ''}" if name else ""


def _runs(results: Results) -> str:
    if not results.records:
        return ""
    return (
        "<details><summary>Every run</summary>\n"
        + to_html(run_table(results), "runs")
        + "</details>\n<p>Records: <code>runs/</code>; as a table: "
        + '<a href="runs.csv">runs.csv</a>; as markdown: <a href="tables.md">tables.md</a>.</p>\n'
    )
