"""lm-eval compiles a prompt's template anew for every example; here each is compiled once.

With 25 examples in a prompt that is most of the time it takes to build the requests (nine tenths
for ARC). The text is the same: a compiled template has no state.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import lm_eval.utils


@contextmanager
def compiled_once() -> Iterator[None]:
    """While open, lm-eval's Jinja environment remembers the templates it has compiled."""
    environment = lm_eval.utils.env
    remembered = functools.lru_cache(maxsize=256)(environment.from_string)
    with patch.object(environment, "from_string", remembered):
        yield
