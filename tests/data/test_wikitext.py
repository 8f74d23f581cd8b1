"""WikiText: articles, exact raw text, the official counts, and the detokeniser."""

import pytest

from sparse_gpt.data.wikitext import detokenise_wikitext, wikitext_articles

# The layout of the data set, with sentences of our own.
ROWS = [
    "",
    " = First Thing = \n",
    "",
    " It was @-@ so to say @-@ small , but 1 @,@ 000 strong . \n",
    " = 2 x = \n",  # an equation, not a title: text above it
    " And so on . \n",
    "",
    " = = Section = = \n",
    "",
    " More . \n",
    "",
    " = Second ( thing ) = \n",
    "",
    " = = = Deep = = = \n",
    " End . \n",
    "",
]


def test_articles():
    articles = list(wikitext_articles(ROWS))
    assert len(articles) == 2
    assert articles[0].startswith(" \n = First Thing = \n \n It was")
    assert articles[1] == " \n = Second ( thing ) = \n \n = = = Deep = = = \n End . \n \n"
    assert "".join(articles) == "".join(row or " \n" for row in ROWS)


def test_lines_without_line_ends_and_without_titles():
    assert list(wikitext_articles(["a b", "", "c"])) == ["a b\n \nc\n"]
    assert list(wikitext_articles(["", "", " \n"])) == []
    titles = ["", " = A = ", "", " = B = ", "", "text"]
    assert list(wikitext_articles(titles)) == [" \n = A = \n", " \n = B = \n \ntext\n"]


def test_file_lines_are_rows():
    lines = [row or " \n" for row in ROWS]
    assert list(wikitext_articles(lines)) == list(wikitext_articles(ROWS))


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (" The well @-@ known 1 @,@ 234 @.@ 5 km . \n", "The well-known 1,234.5 km.\n"),
        (" = Title = \n", "= Title =\n"),
        (" = = The end = = \n", "== The end ==\n"),
        (" = = = A ( b ) = = = \n", "=== A (b) ===\n"),
        (" It 's his ; they 'll ask : why ? No ! \n", "It's his; they'll ask: why? No!\n"),
        (' He did n\'t say " come in " twice . \n', 'He didn\'t say "come in" twice.\n'),
        (' " One " and " two " , \n', '"One" and "two",\n'),
        (" the players ' union \n", "the players' union\n"),
        (" He called it ' odd ' . \n", "He called it 'odd'.\n"),
        (" ( see [ 3 ] ) costs $ 5 and 4 % \n", "(see [3]) costs $5 and 4%\n"),
        (" a <unk> b \n", "a <unk> b\n"),
        (" \n \n", "\n\n"),
    ],
)
def test_detokeniser(raw, plain):
    assert detokenise_wikitext(raw) == plain


def test_detokenising_plain_text_changes_nothing():
    text = "He said \"yes\" (twice), didn't he? It's 1,000.5.\n\nNext: the end.\n"
    assert detokenise_wikitext(text) == text


@pytest.mark.parametrize(("split", "count"), [("validation", 217_646), ("test", 245_569)])
def test_official_counts(hub, split, count):
    import pyarrow.parquet

    folder = hub / "Salesforce" / "wikitext" / "wikitext-103-v1"
    rows = pyarrow.parquet.read_table(folder / f"{split}-00000-of-00001.parquet")["text"]
    articles = list(wikitext_articles(rows.to_pylist()))
    assert len(articles) == 60
    assert sum(len(a.split()) + a.count("\n") for a in articles) == count
    for article in articles:
        plain = detokenise_wikitext(article)
        assert "@-@" not in plain and " , " not in plain
        assert len(plain.split()) < len(article.split())
