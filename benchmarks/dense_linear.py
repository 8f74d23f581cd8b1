"""The dense layer that a sparse one is compared to: the fastest way found of each product."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "dx", "dw")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Dense:
    """The dense layer `[in, out]`: the fastest way found of each of its three products."""

    def __init__(
        self, shape: tuple[int, int], tokens: int, dtype: str, device: torch.device
    ) -> None:
        self.shape, self.flops = shape, 2 * tokens * shape[0] * shape[1]
        kind = {"dtype": DTYPES[dtype], "device": device}
        x, dy = torch.randn(tokens, shape[0], **kind), torch.randn(tokens, shape[1], **kind)
        weight = torch.randn(shape[1], shape[0], **kind)
        turned = weight.t().contiguous()
        ways: dict[str, dict[str, Callable[[], Tensor]]] = {
            "forward": {"W [out, in]": lambda: x @ weight.t(), "W [in, out]": lambda: x @ turned},
            "dx": {"W [out, in]": lambda: dy @ weight, "W [in, out]": lambda: dy @ turned.t()},
            "dw": {"dW [out, in]": lambda: dy.t() @ x, "dW [in, out]": lambda: x.t() @ dy},
        }
        linear = one_dnn_linear() if dtype == "fp32" and device.type == "cpu" else None
        if linear is not None:  # torch's own products in fp32 are MKL's, whatever is allowed
            ways["forward"]["W [out, in], linear"] = lambda: linear(x, weight)
            ways["dx"]["W [in, out], linear"] = lambda: linear(dy, turned)
            ways["dw"]["dW [out, in], linear"] = lambda: linear(dy.t(), x.t())
            ways["dw"]["dW [out, in], linear of copies"] = lambda: linear(
                dy.t().contiguous(), x.t().contiguous()
            )
        self.best: dict[str, tuple[bool, Callable[[], Tensor]]] = {}
        self.names: dict[str, str] = {}
        for name, some in ways.items():
            found = []
            for one_dnn, (way, product) in itertools.product((True, False), some.items()):
                if "linear" in way and not one_dnn:
                    continue
                if linear is not None and one_dnn and "linear" not in way and mkl():
                    continue
                self.timed(one_dnn, product)
                seconds = self.timed(one_dnn, product)
                if not found or seconds < 3 * min(f[0] for f in found):
                    seconds = min(seconds, *(self.timed(one_dnn, product) for _ in range(2)))
                label = f"{way}, {'oneDNN' if one_dnn else 'MKL'}"
                found.append((seconds, label, one_dnn, product))
            _, self.names[name], one_dnn, product = min(found, key=lambda f: f[0])
            self.best[name] = (one_dnn, product)
        self.seconds: dict[str, list[float]] = {name: [] for name in PASSES}

    def timed(self, one_dnn: bool, product: Callable[[], Any]) -> float:
        with allowing_one_dnn(one_dnn):
            return timed(product)

    def run(self) -> dict[str, float]:
        """Seconds of each product."""
        spent = {name: self.timed(*self.best[name]) for name in PASSES}
        for name, seconds in spent.items():
            self.seconds[name].append(seconds)
        return spent


def mkl() -> bool:
    """Whether torch's products in fp32 are MKL's, oneDNN or not."""
    return torch.backends.mkl.is_available()


def one_dnn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """x W^T in fp32 by oneDNN, which torch.compile calls and torch's own products do not."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not torch.backends.mkldnn.is_available():
        return None
    return lambda x, weight: linear(x, weight, None, "none", [], "")


@contextmanager
def allowing_one_dnn(allowed: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPUs that are not there
        with torch.backends.mkldnn.flags(enabled=allowed):
            yield


def timed(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def has_bf16() -> bool:
    return any(word in text for text in cpu_lines() for word in ("avx512_bf16", " bf16"))


def cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
