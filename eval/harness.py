"""lm-eval's Hugging Face model, counting what it truncates, and one function that runs tasks."""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import lm_eval.defaults
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import set_torch_seed

from eval.environment import QuietLogs, resolve_device, torch_dtype
from eval.model_folder import ModelFolder, check_tokenizer
from eval.progress import Progress
from sparse_gpt.errors import UserError
from sparse_gpt.hf import model as _registered  # noqa: F401

# lm-eval's defaults, which the stock command uses too.
SEEDS = {
    "random": lm_eval.defaults.DEFAULT_RANDOM_SEED,
    "numpy": lm_eval.defaults.DEFAULT_OTHER_SEED,
    "torch": lm_eval.defaults.DEFAULT_OTHER_SEED,
    "fewshot": lm_eval.defaults.DEFAULT_OTHER_SEED,
}


# lm-eval's decorator hides the type of the class from type checkers.
_Base: Any = HFLM


class CountingModel(_Base):
    """HFLM whose scores are untouched; it counts requests, and truncated ones, for each task.

    HFLM keeps the last `max_length + 1` tokens of context and continuation and feeds all but
    the last one to the model, so a request loses text exactly if it has more than
    `max_length + 1` tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self._names: list[str] = []

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._names = [request.task_name or "" for request in requests]
        if sys.stderr.isatty():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        print(f"tokenising {len(requests):,} requests", file=sys.stderr, flush=True)
        with Progress("scoring", len(requests)) as progress:
            self.set_cache_hook(_AnswerCounter(progress))
            try:
                return super().loglikelihood(requests, disable_tqdm=True)
            finally:
                self.set_cache_hook(CacheHook(None))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # The base class tokenises the requests in the order they came in.
        for name, (_, context, continuation) in zip(self._names, requests, strict=True):
            self.requests[name] += 1
            self.truncated[name] += len(context) + len(continuation) > self.max_length + 1
            if not continuation:
                raise UserError(
                    f"{name}: the tokenizer merges a whole answer into the end of its question, "
                    "so there is no token to score"
                )
            if len(continuation) > self.max_length:
                raise UserError(
                    f"{name}: an answer has {len(continuation)} tokens, the model's context "
                    f"only {self.max_length} (n_positions): this task does not fit this model"
                )
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)


class _AnswerCounter(CacheHook):
    """lm-eval calls its cache hook for each answered request; ours only counts them."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(None)
        self._progress = progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._progress.advance()


@dataclass(frozen=True)
class Outcome:
    """What lm-eval measured: its `results`, `versions`, `n-shot` and `n-samples` by task name,
    with the number of requests and of truncated requests."""

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    shots: dict[str, int]
    samples: dict[str, dict[str, int]]
    requests: dict[str, int]
    truncated: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)

    def metric(self, task: str, metric: str) -> tuple[float, float | None]:
        """Score and standard error of one task; the error is None for a single document."""
        values = self.results[task]
        error = values[f"{metric}_stderr,none"]
        return float(values[f"{metric},none"]), None if error == "N/A" else float(error)


def open_model(
    folder: ModelFolder, *, device: str, dtype: str, batch_size: int | str
) -> CountingModel:
    """Load a folder as lm-eval would; `UserError` where model and tokenizer do not fit."""
    with QuietLogs():
        model = CountingModel(
            pretrained=str(folder.path),
            device=resolve_device(device),
            dtype=torch_dtype(dtype),
            batch_size=batch_size,
        )
    tokenizer: Any = model.tokenizer
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{folder.path}: the tokenizer names neither a bos nor an eos token")
    check_tokenizer(folder, tokenizer)
    return model


def run(model: CountingModel, loaded: dict[str, Any], limit: int | None) -> Outcome:
    """Evaluate built tasks with lm-eval's default seeds.

    loaded: `tasks`, `groups`, `group_map` as `TaskManager.load` gives them; may be used again
    for the next model. limit: documents for each task, None for all.
    """
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    set_torch_seed(SEEDS["torch"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
    with QuietLogs():
        # lm-eval's default number of bootstrap iterations stays: the metrics used here, mc2 too,
        # are means, whose standard error is closed form, so none is run.
        results: Any = evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=False)
    assert results is not None
    return Outcome(
        results=results["results"],
        versions=results["versions"],
        shots=results["n-shot"],
        samples={name: dict(count) for name, count in results["n-samples"].items()},
        requests=dict(model.requests),
        truncated={name: model.truncated[name] for name in model.requests},
        model={
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
            "max_length": model.max_length,
            "device": str(model.device),
            "torch_threads": torch.get_num_threads(),
        },
    )


def plain_metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's numbers of one task without the filter's name; null for a missing error."""
    return {
        key.removesuffix(",none"): None if value == "N/A" else float(value)
        for key, value in values.items()
        if key.endswith(",none")
    }
