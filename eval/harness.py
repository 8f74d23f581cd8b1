"""lm-eval's Hugging Face model with a faster scorer, and one function that runs tasks."""

import functools
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.defaults
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import set_torch_seed

from eval import batch_size as batch_sizes
from eval import scorer as scorers
from eval.answers import Answers, digest
from eval.environment import QuietLogs, resolve_device, torch_dtype
from eval.model_folder import ModelFolder, check_tokenizer
from eval.progress import Progress
from eval.templates import compiled_once
from sparse_gpt.errors import UserError
from sparse_gpt.hf.stock import check_folder, naming

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
    """HFLM that counts requests, and truncated ones, for each task.

    HFLM keeps the last `max_length + 1` tokens of context and continuation and feeds all but
    the last one to the model, so a request loses text exactly if it has more than
    `max_length + 1` tokens.

    scorer: what computes the answers; None for HFLM's own way. answers_path: where `scorer`
    keeps them while it works, None for nowhere. begin, advance: told the number of a task's
    requests, then requests and tokens done; without them a progress line or bar is shown.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.scorer: scorers.Scorer | None = None
        self.answers_path: Path | None = None
        self.begin: Callable[[str, int], None] | None = None
        self.advance: Callable[[int, int], None] | None = None
        self.measured: batch_sizes.Measured | None = None
        self._names: list[str] = []
        self._taken: list[scorers.Request] | None = None
        # The answers of a question follow each other, and each asks for the question's tokens.
        self._encoded = functools.lru_cache(maxsize=4)(super().tok_encode)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        if args or kwargs:
            return super().tok_encode(string, *args, **kwargs)
        return self._encoded(string)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._names = [request.task_name or "" for request in requests]
        if self.scorer is None and sys.stderr.isatty():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        if self.begin is not None and self.advance is not None:
            self.begin(self._names[0], len(requests))
            return self._hooked(requests, self.advance)
        print(f"tokenising {len(requests):,} requests", file=sys.stderr, flush=True)
        with Progress("scoring", len(requests)) as progress:
            return self._hooked(requests, lambda answered, _: progress.advance(answered))

    def tokens(self, requests: list[Instance]) -> list[scorers.Request]:
        """Context and continuation of each request, as lm-eval tokenises them."""
        taken: list[scorers.Request] = []
        self._taken = taken
        try:
            super().loglikelihood(requests, disable_tqdm=True)
            return taken
        finally:
            self._taken = None

    def _hooked(
        self, requests: list[Instance], advance: Callable[[int, int], None]
    ) -> list[tuple[float, bool]]:
        self._report = advance
        self.set_cache_hook(_AnswerCounter(advance))
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
        if self._taken is not None:
            self._taken += [(context, continuation) for _, context, continuation in requests]
            return []
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
        if self.scorer is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        tokens = [(context, continuation) for _, context, continuation in requests]
        answers = Answers(len(tokens), digest(tokens), self.answers_path)
        self._report(int(answers.done.sum()), 0)
        self.scorer.answer(tokens, answers, self._report)
        answers.save(now=True)
        return answers.as_list()


class _AnswerCounter(CacheHook):
    """lm-eval calls its cache hook for each answered request; ours only counts them."""

    def __init__(self, advance: Callable[[int, int], None]) -> None:
        super().__init__(None)
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(1, 0)


@dataclass(frozen=True)
class Outcome:
    """What lm-eval measured: its `results`, `versions`, `n-shot` and `n-samples` by task name,
    with the number of requests and of truncated requests, and with lm-eval's `samples` (one
    entry a document) if they were asked for."""

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    shots: dict[str, int]
    samples: dict[str, dict[str, int]]
    requests: dict[str, int]
    truncated: dict[str, int]
    model: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def metric(self, task: str, metric: str) -> tuple[float, float | None]:
        """Score and standard error of one task; the error is None for a single document."""
        values = self.results[task]
        error = values[f"{metric}_stderr,none"]
        return float(values[f"{metric},none"]), None if error == "N/A" else float(error)


def open_model(
    folder: ModelFolder, *, device: str, dtype: str, batch_size: int | str, scorer: str = "auto"
) -> CountingModel:
    """Load a folder as lm-eval would; `UserError` where model and tokenizer do not fit.

    batch_size: sequences of full length at a time (of any length with the stock scorer), or
    "auto". scorer: "shared" computes common beginnings once, "stock" is HFLM's own way, "auto"
    is shared where it knows the model.
    """
    check_folder(folder.path)
    with QuietLogs(), naming(folder.path):
        model = CountingModel(
            pretrained=str(folder.path),
            device=resolve_device(device),
            dtype=torch_dtype(dtype),
            batch_size=batch_size,
            trust_remote_code=False,
        )
    tokenizer: Any = model.tokenizer
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{folder.path}: the tokenizer names neither a bos nor an eos token")
    check_tokenizer(folder, tokenizer)
    known = scorers.supports(model.model)
    if scorer == "shared" and not known:
        kind = folder.config.get("model_type")
        raise UserError(f"--scorer shared: not for models of type {kind!r}; use stock")
    if scorer == "stock" or not known:
        return model
    length = model.max_length
    model.scorer = scorers.Scorer(
        model.model, max_length=length, budget=length, softmax_dtype=model.softmax_dtype
    )
    sizes = None if batch_size == "auto" else [int(batch_size)]
    model.measured = batch_sizes.measure(model.scorer.compute, length, sizes)
    model.scorer.budget = model.measured.tokens
    return model


def run(
    model: CountingModel, loaded: dict[str, Any], limit: int | None, documents: bool = False
) -> Outcome:
    """Evaluate built tasks with lm-eval's default seeds.

    loaded: `tasks`, `groups`, `group_map` as `TaskManager.load` gives them; may be used again
    for the next model. limit: documents for each task, None for all. documents: keep lm-eval's
    record of every document.
    """
    model.requests.clear()
    model.truncated.clear()
    seed(loaded)
    with QuietLogs(), compiled_once():
        # lm-eval's default number of bootstrap iterations stays: the metrics used here, mc2 too,
        # are means, whose standard error is closed form, so none is run.
        results: Any = evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=documents)
    assert results is not None
    return Outcome(
        results=results["results"],
        versions=results["versions"],
        shots=results["n-shot"],
        samples={name: dict(count) for name, count in results["n-samples"].items()},
        requests=dict(model.requests),
        truncated={name: model.truncated[name] for name in model.requests},
        model=describe(model),
        documents=results["samples"] if documents else {},
    )


def seed(loaded: dict[str, Any]) -> None:
    """Set every generator as the stock command does; few-shot examples have one for each task."""
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    set_torch_seed(SEEDS["torch"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def describe(model: CountingModel) -> dict[str, Any]:
    """What a result says of the loaded model and the machine."""
    return {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "max_length": model.max_length,
        "device": str(model.device),
        "torch_threads": torch.get_num_threads(),
    }


def plain_metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's numbers of one task without the filter's name; null for a missing error."""
    return {
        key.removesuffix(",none"): None if value == "N/A" else float(value)
        for key, value in values.items()
        if key.endswith(",none")
    }
