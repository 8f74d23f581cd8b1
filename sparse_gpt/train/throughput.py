"""Tokens a second and model FLOPs utilisation, over the time that training alone took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_gpt.model.flops import FlopsLedger, mfu, peak_flops


class Throughput:
    """A stopwatch over training steps, read and started again at every log line.

    `peak_tflops` is one device's, in 1e12 FLOP/s; without it the GPU's data sheet is asked, and
    where that is not known there is no MFU. `masked`: whether sparse layers are dense products
    over zeros, whose MFU is shown beside that of the active FLOPs.
    """

    def __init__(
        self,
        ledger: FlopsLedger,
        seq_len: int,
        device: torch.device,
        precision: str,
        world_size: int,
        peak_tflops: float | None,
        masked: bool,
    ) -> None:
        peak = peak_tflops * 1e12 if peak_tflops else None
        if peak is None and device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device), precision)
        self._peak = peak * world_size if peak else None
        self._dense = ledger.dense.total / seq_len if masked else None
        self._tokens, self._flops, self._start = 0, 0, time.perf_counter()

    def add(self, tokens: int, flops: int) -> None:
        """A step: its tokens, and its active FLOPs."""
        self._tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (validation, checkpoints) does not count."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float | None]:
        """Since the last reading: tokens/s, and MFU of the active FLOPs and of dense products."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate, active = self._tokens / seconds, self._flops / seconds
        self._tokens, self._flops, self._start = 0, 0, now
        return {
            "tokens_per_second": rate,
            "mfu_active": mfu(1.0, active, self._peak),
            "mfu_dense": None if self._dense is None else mfu(self._dense, rate, self._peak),
        }
