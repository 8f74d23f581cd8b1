"""Log-likelihoods of continuations: what lm-eval's HFLM computes, with less work.

The same tokens go through the same model, but equal inputs and common beginnings are computed
once (see `sharing`), and logits are made where a continuation is scored and nowhere else. A
log-likelihood differs from HFLM's in the last bits, as HFLM's own does with another batch size:
matrix products of other shapes sum in another order.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.answers import Answers
from eval.sharing import Row, batches, plan_rows
from sparse_gpt.hf.model import SparseGPTForCausalLM

# Rows with several sequences may be this long where the context is shorter: a long prefix then
# serves more of them, and attention still costs less than the layers.
SHARED_ROW = 512

Request = tuple[Sequence[int], Sequence[int]]  # context and continuation, token ids


@dataclass(frozen=True)
class Window:
    """One different input of the model: the last `max_length` tokens that predict something.

    scored: how many of the last positions predict a token of a continuation of some request.
    """

    tokens: np.ndarray
    scored: int


def supports(model: torch.nn.Module) -> bool:
    """Whether a model is one whose inside is known here: GPT-2's or our own."""
    from transformers import GPT2LMHeadModel

    return isinstance(model, GPT2LMHeadModel | SparseGPTForCausalLM)


class Scorer:
    """Scores requests with one model.

    model: what `supports` knows. max_length: the model's context, in tokens. softmax_dtype: of
    the log-softmax, None for that of the logits. budget: padded tokens computed at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        max_length: int,
        budget: int,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.max_length, self.budget = model, max_length, budget
        self.softmax_dtype = softmax_dtype
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype

    @torch.no_grad()
    def compute(self, count: int) -> None:
        """Work through `count` sequences of full length, to measure how fast that is."""
        tokens = np.zeros(self.max_length, dtype=np.int32)
        windows = [Window(tokens, max(1, self.max_length // 8))] * count
        rows = [Row(0, (index,), self.max_length) for index in range(count)]
        self._log_probabilities(rows, windows)

    def windows(self, requests: Sequence[Request]) -> tuple[list[Window], np.ndarray]:
        """The different inputs of requests, and for each request the index of its input."""
        places: dict[bytes, int] = {}
        tokens: list[np.ndarray] = []
        scored: list[int] = []
        index = np.empty(len(requests), dtype=np.int64)
        for number, (context, continuation) in enumerate(requests):
            # As HFLM: the last max_length + 1 tokens, of which the last is only predicted.
            whole = [*context[-(self.max_length + 1) :], *continuation]
            window = np.asarray(whole[-(self.max_length + 1) :][:-1], dtype=np.int32)
            place = places.setdefault(window.tobytes(), len(tokens))
            if place == len(tokens):
                tokens.append(window)
                scored.append(0)
            scored[place] = max(scored[place], len(continuation))
            index[number] = place
        return [Window(t, s) for t, s in zip(tokens, scored)], index

    def plan(self, windows: Sequence[Window]) -> list[Row]:
        """Rows for all windows; without common prefixes where the model takes no such rows."""
        limit = max(self.max_length, SHARED_ROW)
        if isinstance(self.model, SparseGPTForCausalLM):
            limit = self.max_length
        shareable = [len(window.tokens) - window.scored for window in windows]
        return plan_rows([window.tokens for window in windows], shareable, limit)

    @torch.no_grad()
    def answer(
        self,
        requests: Sequence[Request],
        answers: Answers,
        advance: Callable[[int, int], None] = lambda answered, tokens: None,
    ) -> None:
        """Answer the requests that `answers` lacks, saving now and then.

        advance: called with the number of requests and of computed tokens after each batch.
        """
        missing = np.flatnonzero(~answers.done).tolist()
        windows, index = self.windows([requests[number] for number in missing])
        asking: list[list[int]] = [[] for _ in windows]
        for number, place in zip(missing, index):
            asking[place].append(number)
        todo = batches(self.plan(windows), self.budget)[::-1]
        while todo:
            batch = todo.pop()
            try:
                predicted = self._log_probabilities(batch, windows)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                torch.cuda.empty_cache()
                self.budget //= 2
                print(f"out of memory: {self.budget:,} tokens at a time", file=sys.stderr)
                half = len(batch) // 2
                todo += [batch[half:], batch[:half]]
                continue
            before = int(answers.done.sum())
            for place, (logs, best) in predicted.items():
                for number in asking[place]:
                    continuation = requests[number][1]
                    answers.put(number, *_answer(logs, best, continuation))
            advance(int(answers.done.sum()) - before, sum(row.length for row in batch))
            answers.save()

    def _log_probabilities(
        self, batch: Sequence[Row], windows: Sequence[Window]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """For each window its scored positions' log-probabilities `[scored, V]` and argmax."""
        layout = Layout.of(batch, windows, self.device)
        mask = layout.mask(self.dtype) if layout.segments is not None else None
        hidden = self._hidden(layout.tokens, layout.positions, mask)
        picked = hidden.flatten(0, 1)[layout.picked]
        logs = F.log_softmax(self._head(picked), dim=-1, dtype=self.softmax_dtype)
        best = logs.argmax(-1).cpu()
        logs = logs.cpu() if self.device.type == "cpu" else logs
        return {
            place: (logs[start:end], best[start:end])
            for place, (start, end) in layout.spans.items()
        }

    def _hidden(self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """`[B, S]` -> what the head sees, `[B, S, width]`."""
        if isinstance(self.model, SparseGPTForCausalLM):
            return self.model.gpt.head_input(tokens, positions=positions, mask=mask)
        core = self.model.get_submodule("transformer")
        return core(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state

    def _head(self, x: Tensor) -> Tensor:
        if isinstance(self.model, SparseGPTForCausalLM):
            return F.linear(x, self.model.gpt.wte.weight)
        return self.model.get_submodule("lm_head")(x)


def _answer(logs: Tensor, best: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness of a continuation at the last positions of its window."""
    targets = torch.tensor(continuation)
    count = len(continuation)
    chosen = logs[-count:].gather(1, targets.to(logs.device).unsqueeze(1)).squeeze(1)
    return float(chosen.sum()), bool((best[-count:] == targets).all())


@dataclass(frozen=True)
class Layout:
    """A batch of rows as tensors.

    tokens `[B, S]`, padded on the right. segments, positions `[B, S]`: None where every row is
    one plain sequence; else 0 in a prefix, 1, 2, ... in the members' rests, -1 in padding. picked:
    scored positions in the flattened batch; spans: the part of `picked` that is a window's.
    """

    tokens: Tensor
    segments: Tensor | None
    positions: Tensor | None
    picked: Tensor
    spans: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, batch: Sequence[Row], windows: Sequence[Window], device: torch.device) -> "Layout":
        size = max(row.length for row in batch)
        shape = (len(batch), size)
        tokens = np.zeros(shape, dtype=np.int64)
        segments, positions = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        picked: list[np.ndarray] = []
        spans: dict[int, tuple[int, int]] = {}
        count = 0
        for number, row in enumerate(batch):
            at = row.prefix
            tokens[number, :at] = windows[row.members[0]].tokens[:at]
            segments[number, :at], positions[number, :at] = 0, np.arange(at)
            for segment, member in enumerate(row.members, start=1):
                rest = windows[member].tokens[row.prefix :]
                end = at + len(rest)
                tokens[number, at:end] = rest
                segments[number, at:end] = segment
                positions[number, at:end] = np.arange(row.prefix, row.prefix + len(rest))
                scored = windows[member].scored
                picked.append(np.arange(end - scored, end) + number * size)
                spans[member] = (count, count + scored)
                count, at = count + scored, end
        shared = any(len(row.members) > 1 for row in batch)

        def moved(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        return cls(
            tokens=moved(tokens),
            segments=moved(segments) if shared else None,
            positions=moved(positions) if shared else None,
            picked=moved(np.concatenate(picked)),
            spans=spans,
        )

    def mask(self, dtype: torch.dtype) -> Tensor:
        """`[B, 1, S, S]`, 0 where a position sees another: earlier, and in the prefix or its own
        segment; the least number of `dtype` elsewhere."""
        assert self.segments is not None
        query, key = self.segments.unsqueeze(2), self.segments.unsqueeze(1)
        size = self.segments.shape[1]
        earlier = torch.ones(size, size, dtype=torch.bool, device=self.segments.device).tril()
        seen = earlier & ((key == query) | (key == 0))
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
