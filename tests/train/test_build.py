"""Weights to start from: refused where they are of another model."""

from dataclasses import replace

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.ift import Transform
from sparse_gpt.model.gpt import GPTConfig
from sparse_gpt.train.build import check_source

PLAIN = GPTConfig(n_layer=1, n_head=1, d_model=4, d_ff=16, vocab_size=11, n_positions=6)
DOPED = replace(PLAIN, transform=Transform("doped", "relu", {"h.0.attn.q": 2}))
WIDER = replace(PLAIN, transform=Transform("doped", "relu", {"h.0.attn.q": 3}))
GELU = replace(PLAIN, transform=Transform("doped", "gelu", {"h.0.attn.q": 2}))


@pytest.mark.parametrize("config", [PLAIN, DOPED])
def test_the_same_model_is_not_refused(config):
    check_source(config, replace(config, dropout=0.5, init_std=0.1), "a", "a")


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        (DOPED, PLAIN, r"ift: layers of the form doped \(the weights: plain\)"),
        (PLAIN, DOPED, r"ift: layers of the form plain \(the weights: doped\)"),
        (WIDER, DOPED, "or of other sizes"),
        (GELU, DOPED, "another model: ift: layers of the form doped"),
        (replace(PLAIN, d_embed=2), PLAIN, r"model\.d_embed: 2 \(the weights: None\)"),
        (replace(DOPED, d_ff=8), PLAIN, r"model\.d_ff: 8 .*; ift: layers"),
        (PLAIN, replace(PLAIN, vocab_size=12), "a vocabulary of 11, but the weights"),
    ],
)
def test_another_model_is_refused(wanted, given, message):
    with pytest.raises(UserError, match=message):
        check_source(wanted, given, None, "a")


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="another tokenizer"):
        check_source(PLAIN, PLAIN, "a", "b")
