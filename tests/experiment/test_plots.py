"""What the plots draw, and that a plot is one drawing in two themes."""

from xml.etree import ElementTree

import pytest

from sparse_gpt.experiment.arms import arms, comparisons
from sparse_gpt.experiment.drawing import DARK, LIGHT, Plot, drawn, figure, label, styles
from sparse_gpt.experiment.plots import _pair, curve, forest, perplexity_flops
from sparse_gpt.experiment.results import read
from sparse_gpt.experiment.special_plots import grid, lr_lines
from sparse_gpt.experiment.statistics import perplexity
from tests.experiment import synthetic


@pytest.fixture(scope="module")
def iso_flop(tmp_path_factory):
    return read(synthetic.iso_flop(tmp_path_factory.mktemp("plots") / "x"))


def test_a_curve_is_over_the_steps_that_all_seeds_have(tmp_path):
    records = [synthetic.record("dense", seed, 4.0) for seed in (1, 2)]
    records[0]["curve"] = [[10, 100, 1e9, 5.0], [20, 200, 2e9, 4.0], [30, 300, 3e9, float("nan")]]
    records[1]["curve"] = [[20, 200, 4e9, 4.2], [30, 300, 6e9, 3.0]]
    (arm,) = arms(read(synthetic.write(tmp_path / "x", records)), "pretrain")
    assert curve(arm) == [(20, 200, 3e9, pytest.approx(4.1), pytest.approx(0.2 / 2**0.5))]


def test_the_forest_has_an_interval_a_comparison_and_fills_findings(iso_flop):
    found = comparisons(iso_flop)
    (axes,) = forest(found).axes
    ends = [tuple(line.get_xdata()) for line in axes.lines if len(set(line.get_xdata())) == 2]
    assert ends == [(c.pairs.low, c.pairs.high) for c in found]
    assert [text.get_text() for text in axes.get_yticklabels()][4] == (
        "Sparse Wide 75 %, SET − dense, more tokens  (n = 3)"
    )
    means = axes.collections[1::2]
    filled = [tuple(c.get_facecolor()[0]) != tuple(axes.get_facecolor()) for c in means]
    assert filled == [c.verdict in ("better", "worse") for c in found]


def test_marks_are_at_the_perplexity_of_the_mean_loss(iso_flop):
    trained = arms(iso_flop, "pretrain")
    (axes,) = perplexity_flops(trained, styles([arm.name for arm in trained])).axes
    large = [c for c in axes.collections if not c.get_label().startswith("_")]
    for arm, mark in zip(trained, large, strict=True):
        losses = list(arm.losses("test").values())
        x, y = mark.get_offsets()[0]
        assert (x, y) == pytest.approx((arm.flops(), perplexity(sum(losses) / len(losses))))


def test_an_lr_grid_has_the_losses_of_all_seeds_in_order(tmp_path):
    results = read(synthetic.spdf(tmp_path / "x"))
    (arm,) = [a for a in arms(results, "finetune") if (a.name, a.mode) == ("wide75", "sparse")]
    points = grid(arm)
    assert list(points) == [1e-4, 3e-4, 1e-3]
    assert [len(losses) for losses in points.values()] == [3, 3, 3]
    (axes,) = lr_lines({"a": points}).axes
    assert axes.get_xscale() == "log"
    means = [sum(losses) / 3 for losses in points.values()]
    assert list(axes.lines[0].get_ydata()) == pytest.approx(means)


def test_the_dark_theme_is_the_light_one_in_other_colours():
    def draw():
        made = figure(3, 2)
        made.subplots().set_title(label("a $x$ & <b>"))
        return made

    made = drawn(Plot("x", "x", "x", draw))
    assert made.light != made.dark
    for tone in LIGHT.values():
        assert tone not in made.dark
    assert DARK["text"] in made.dark
    texts = [element.text for element in ElementTree.fromstring(made.light).iter()]
    assert "a $x$ & <b>" in texts, "a label is no mathematics and no markup"
    assert made.png.startswith(b"\x89PNG")


def test_labels_are_short_and_never_hidden():
    assert label("_hidden") == " _hidden"
    assert len(label("x" * 200)) == 40


def test_a_pair_of_long_names_takes_two_lines():
    """What tells fine-tunings apart stands at their end."""
    assert _pair("Wide", "Dense", 3) == "Wide − Dense  (n = 3)"
    arm = "Sparse Wide 75 %, SET, dense fine-tuning"
    against = "Dense, projected to wide embeddings, dense fine-tuning"
    assert _pair(arm, against, 3) == f"{arm}\n− {against}  (n = 3)"


def test_arms_are_told_apart_by_more_than_colour():
    found = styles([str(number) for number in range(20)])
    kinds = {(s.colour, s.marker, s.line) for s in found.values()}
    assert len(kinds) == 20
