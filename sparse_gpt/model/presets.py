"""Dimensions by name: the GPT-3 family and the Sparse Wide variants of GPT-3 Small.

The GPT-3 paper's own table slips twice: its XL has 24 heads of 128, which is not 2048 (16 is),
and its 13B is 5140 wide, which 40 heads do not divide (5120 is meant). FACTS section 2.
"""

import difflib

from sparse_gpt.errors import UserError
from sparse_gpt.ift.wide import widen

Dims = dict[str, int]


def _gpt3(n_layer: int, d_model: int, n_head: int) -> Dims:
    return {"n_layer": n_layer, "n_head": n_head, "d_model": d_model, "d_ff": 4 * d_model}


_SMALL = _gpt3(12, 768, 12)

PRESETS: dict[str, Dims] = {
    "gpt3-small": _SMALL,
    "gpt3-medium": _gpt3(24, 1024, 16),
    "gpt3-large": _gpt3(24, 1536, 16),
    "gpt3-xl": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
    # The dimensions of the variants as trained; a run gives them its own sparsity.
    "gpt3-small-sw50": widen(_SMALL, 0.50),
    # The filter size of the authors' published yaml; their Table 17 counts 4344.
    "gpt3-small-sw50-filter4368": {**widen(_SMALL, 0.50), "d_ff": 4368},
    "gpt3-small-sw75": widen(_SMALL, 0.75),
    "gpt3-small-sw90": widen(_SMALL, 0.90),
}

ALIASES: dict[str, str] = {
    "gpt3-125m": "gpt3-small",
    "gpt3-350m": "gpt3-medium",
    "gpt3-760m": "gpt3-large",
    "gpt3-1.3b": "gpt3-xl",
}


def preset(name: str) -> Dims:
    """`n_layer, n_head, d_model, d_ff` of a preset or alias, a fresh dict.

    Raises `UserError` for an unknown name, with the nearest known one.
    """
    known = [*PRESETS, *ALIASES]
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        raise UserError(f"model.preset: no preset {name!r}; {hint}")
    return dict(PRESETS[ALIASES.get(name, name)])
