"""Preset dimensions: FACTS section 2."""

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.model.flops import linear_shapes
from sparse_gpt.model.presets import ALIASES, PRESETS, preset


@pytest.mark.parametrize(
    ("name", "n_layer", "d_model", "n_head", "d_ff"),
    [
        ("gpt3-small", 12, 768, 12, 3072),
        ("gpt3-medium", 24, 1024, 16, 4096),
        ("gpt3-large", 24, 1536, 16, 6144),
        ("gpt3-xl", 24, 2048, 16, 8192),
        ("gpt3-2.7b", 32, 2560, 32, 10240),
        ("gpt3-6.7b", 32, 4096, 32, 16384),
        ("gpt3-13b", 40, 5120, 40, 20480),
        ("gpt3-175b", 96, 12288, 96, 49152),
        ("gpt3-small-sw50", 12, 1092, 12, 4344),
        ("gpt3-small-sw50-filter4368", 12, 1092, 12, 4368),
        ("gpt3-small-sw75", 12, 1536, 12, 6144),
        ("gpt3-small-sw90", 12, 2424, 12, 9720),
    ],
)
def test_dimensions(name, n_layer, d_model, n_head, d_ff):
    expected = {"n_layer": n_layer, "n_head": n_head, "d_model": d_model, "d_ff": d_ff}
    assert preset(name) == expected
    assert d_model % n_head == 0


def test_every_preset_is_listed_here():
    assert len(PRESETS) == 12


def test_aliases_name_presets():
    assert {"gpt3-125m", "gpt3-350m", "gpt3-760m", "gpt3-1.3b"} == set(ALIASES)
    for alias, name in ALIASES.items():
        assert preset(alias) == PRESETS[name]


def test_sizes_are_what_the_names_say():
    for name, billions in [("gpt3-2.7b", 2.7), ("gpt3-6.7b", 6.7), ("gpt3-175b", 175)]:
        dims = preset(name)
        weights = sum(out * inner for out, inner in linear_shapes(dims).values())
        total = weights + dims["d_model"] * (50257 + 2048)
        assert total / 1e9 == pytest.approx(billions, rel=0.03)


def test_a_preset_is_a_copy():
    preset("gpt3-small")["d_model"] = 1
    assert preset("gpt3-small")["d_model"] == 768


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gpt3-smal", "gpt3-small"), ("GPT3-XL", "gpt3-xl"), ("gpt3-small-sw57", "gpt3-small-sw75")],
)
def test_an_unknown_name_names_the_nearest(name, hint):
    with pytest.raises(UserError, match=f"model.preset.*{name}.*did you mean '{hint}'"):
        preset(name)


def test_a_strange_name_lists_them_all():
    with pytest.raises(UserError, match=r"there are: gpt3-small, .*gpt3-1\.3b"):
        preset("zzzzzzzz")
