"""What must be set before `datasets`, `transformers` and `lm_eval` are imported."""

import logging
import os
import platform
import sys
from importlib.metadata import version
from typing import Any

from sparse_gpt.errors import UserError

PACKAGES = ("lm_eval", "transformers", "tokenizers", "datasets", "torch")


def prepare_environment(offline: bool) -> None:
    """Quiet bars off a terminal and, if `offline`, no network.

    The libraries read these variables when they are first imported, so an entry point calls this
    before importing any of them.
    """
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a score."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def resolve_device(name: str) -> str:
    """`auto` is CUDA where there is a device; `cuda` without one is a `UserError`."""
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise UserError("--device cuda: torch sees no CUDA device; use --device auto or cpu")
    return name


def torch_dtype(name: str) -> Any:
    """A torch dtype, or the word `auto`: the dtype that config.json names."""
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


class QuietLogs(logging.Filter):
    """While open, drops two lm-eval warnings that come by the thousand and say nothing new."""

    # The share of truncated requests is in the result; the rule for the few-shot split is the
    # stock tasks' own, kept on purpose (see leaderboard_tasks).
    _KNOWN = ("Combined length of context", "num_fewshot > 0 but fewshot_split is None")
    _LOGGERS = ("lm_eval.models.huggingface", "lm_eval.api.task")

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self._KNOWN)

    def __enter__(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).addFilter(self)

    def __exit__(self, *_: object) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).removeFilter(self)
