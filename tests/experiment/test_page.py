"""The page: complete, self-contained, and nothing that a record says becomes markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.experiment.page import write
from sparse_gpt.experiment.run import remake_page
from tests.experiment import synthetic

VOID = {"meta", "img", "source", "br", "link", "input"}


class Parsed(HTMLParser):
    """Tags balanced, with their attributes, texts and what they load."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.content: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        self.content.setdefault(where, []).append(data)
        if where not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def loads(self) -> list[str]:
        """Every address that a browser would fetch by itself."""
        names = ("src", "srcset", "data", "poster", "action", "background")
        found = [a[name] or "" for _, a in self.tags for name in names if a.get(name)]
        return found + [a["href"] or "" for tag, a in self.tags if tag == "link" and "href" in a]


def page_of(folder: Path) -> Parsed:
    return Parsed(write(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def iso_flop(tmp_path_factory):
    folder = synthetic.iso_flop(tmp_path_factory.mktemp("results") / "iso_flop")
    return folder, page_of(folder)


def test_the_page_needs_no_network(iso_flop):
    _, page = iso_flop
    loads = page.loads()
    assert loads and all(address.startswith("data:image/svg+xml;base64,") for address in loads)
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["runs.csv", "tables.md"]
    style, script = page.content["style"], page.content["script"]
    assert "http" not in "".join(script) and not re.search("url|@import", "".join(style))


def test_the_policy_allows_the_pages_own_style_and_script_alone(iso_flop):
    _, page = iso_flop
    (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
    assert policy is not None and policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        digest = hashlib.sha256("".join(page.content[tag]).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_plots_are_well_formed_in_both_themes(iso_flop):
    folder, page = iso_flop
    images = [base64.b64decode(address.split(",")[1]) for address in page.loads()]
    roots = [ElementTree.fromstring(image) for image in images]
    assert len(roots) == 6 and all(root.tag.endswith("svg") for root in roots)
    assert len(set(images)) == 6, "light and dark differ"
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"curves.png", "differences.png", "perplexity_flops.png"}


def test_the_answer_comes_first_and_tells_wins_and_losses(iso_flop):
    _, page = iso_flop
    text = page.text
    answer = text[text.index("Does a Sparse Wide model") : text.index("Arms")]
    assert (
        "at equal FLOPs of the whole model: “Sparse Wide 75 %, SET” (-0.0365) has a lower" in answer
    )
    assert "is not told apart from “dense, more tokens”" in answer
    assert "All 24 planned runs are there." in answer
    assert "Beware" not in text
    assert "python launch/experiment.py configs/experiments/small/iso_flop.yaml" in text


def test_writing_again_gives_the_same_bytes(iso_flop):
    folder, _ = iso_flop
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    write(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_texts_of_records_stay_text(tmp_path):
    hostile = "<script>alert(1)</script>\"'><img src=http://x/> | $x_$ \x00 _y"
    tree = synthetic.record("dense", 1, 4.0, label=hostile)
    tree["device"] = tree["finished"] = tree["versions"]["torch"] = hostile
    tree["data"] = {hostile: hostile}
    about = {"title": hostile, "question": hostile, "command": hostile}
    folder = synthetic.write(tmp_path / "x", [tree], about=about)
    (folder / "runs" / "<img src=y>.json").write_text("{}", encoding="utf-8")
    page = page_of(folder)
    assert {tag for tag, _ in page.tags} & {"img", "script"} == {"img", "script"}
    assert all(address.startswith("data:") for address in page.loads())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<script>alert(1)</script>" in page.text and "<img src=y>.json" in page.text
    for address in page.loads():
        ElementTree.fromstring(base64.b64decode(address.split(",")[1]))
    assert "<script" not in (folder / "tables.md").read_text(encoding="utf-8")


def test_an_unfinished_experiment_says_what_is_missing(tmp_path):
    records = [synthetic.record("dense", seed, 4.0 + seed / 100) for seed in (1, 2)]
    records.append(synthetic.record("set75", 1, 3.9, sparsity=0.75, algorithm="set"))
    plan = synthetic.plan_of([*records, synthetic.record("set75", 2, 0.0)])
    page = page_of(synthetic.write(tmp_path / "x", records, plan=plan))
    assert "3 of 4 planned runs are there." in page.text
    assert "1 of 4 planned runs have no record: set75-s2." in page.text
    assert "1 of 2 (1)" in page.text
    assert "one pair, no interval" in page.text and "is not tested against “dense”" in page.text
    assert not any(tag == "b" for tag, _ in page.tags), "no bold without a test"


def test_an_experiment_without_records_has_a_page(tmp_path):
    plan = synthetic.plan_of([synthetic.record("dense", 1, 4.0)])
    page = page_of(synthetic.write(tmp_path / "x", [], plan=plan))
    assert "No answer yet: 0 finished runs" in page.text
    assert "0 of 1 planned runs are there." in page.text


def test_bad_records_are_refused_by_name_and_the_others_shown(tmp_path):
    good = synthetic.record("dense", 1, 4.0)
    folder = synthetic.write(tmp_path / "x", [good])
    bad = {
        "schema": good | {"run": "schema", "schema": 2},
        "elsewhere": good | {"run": "elsewhere", "experiment": "other"},
        "twice": good | {"run": "twice"},
        "renamed": good,
        "nomodel": good | {"run": "nomodel", "seed": 5, "model": None},
        "text": good | {"run": "text", "seed": "1"},
        "huge": good | {"run": "huge", "seed": 6, "tokens": 10**40},
    }
    for name, tree in bad.items():
        (folder / "runs" / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "runs" / "cut.json").write_text('{"schema": 1, "exp', encoding="utf-8")
    (folder / "runs" / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (folder / "runs" / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (folder / "runs" / "link.json").symlink_to("/etc/passwd")
    text = page_of(folder).text
    for name in (*bad, "cut", "deep", "bytes", "link"):
        assert f"Refused: {name}.json: " in text
    assert "renamed.json: it calls itself 'dense-s1'" in text
    assert "1 finished run." in text


def test_the_command_makes_the_page_anew_from_the_records(tmp_path, capsys):
    folder = synthetic.write(tmp_path / "results" / "iso_flop", [synthetic.record("dense", 1, 4.0)])
    config = "configs/experiments/small/iso_flop.yaml"
    shipped = Path(__file__).resolve().parents[2] / config
    remake_page(shipped, work=tmp_path / "work", results=folder.parent)
    assert capsys.readouterr().out == f"page: {folder / 'index.html'}\n"
    text = Parsed((folder / "index.html").read_text("utf-8")).text
    # The record is of a run that this file does not ask for.
    assert "Refused: dense-s1.json: of another run than planned: " in text
    assert "0 of " in text
    (folder / "runs/dense-s1.json").write_text("[" * 100_000)
    remake_page(shipped, work=tmp_path / "work", results=folder.parent)
    assert "Refused: dense-s1.json: " in Parsed((folder / "index.html").read_text("utf-8")).text


def test_a_folder_that_is_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no results folder"):
        write(tmp_path)
