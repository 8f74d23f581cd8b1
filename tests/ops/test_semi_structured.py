"""The 2:4 kernel: its arithmetic with a stand-in for the packed weight, and who may use it.

Packed weights exist on NVIDIA GPUs only: tests/gpu has the same comparison there.
"""

import pytest
import torch
from torch import Tensor

from sparse_gpt.errors import UserError
from sparse_gpt.ops import KERNELS, Pattern, resolve_kernel, semi_structured
from sparse_gpt.topology.n_m import magnitude_keys, n_m_mask, transposable_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def two_of_four(weight: Tensor, transposable: bool) -> Pattern:
    keys = magnitude_keys(weight)
    if not transposable:
        return Pattern(n_m_mask(keys, 2, 4))
    rows, columns = weight.shape
    tiles = keys.long().view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 4, 4)
    mask = transposable_mask(tiles, 2).view(rows // 4, columns // 4, 4, 4)
    return Pattern(mask.transpose(1, 2).reshape(rows, columns))


@pytest.fixture
def packed(monkeypatch) -> list[Tensor]:
    """What is packed, with dense products in place of sparse ones."""
    seen: list[Tensor] = []

    def pack(weight: Tensor) -> Tensor:
        assert weight.is_contiguous()
        seen.append(weight)
        return weight

    monkeypatch.setattr(semi_structured, "_pack", pack)
    monkeypatch.setattr(semi_structured, "why_not", lambda device, dtype=None: None)
    return seen


@pytest.mark.parametrize("grad", ["active", "dense"])
@pytest.mark.parametrize("transposable", [False, True])
def test_the_reference_by_sparse_products(packed, transposable, grad):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    pattern = two_of_four(weight, transposable)
    x, bias = torch.randn(3, 5, 128, generator=generator), torch.randn(64, generator=generator)
    dy = torch.randn(3, 5, 64, generator=generator)
    found = []
    for name in ("reference", "semi_structured"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = KERNELS[name](leaves[0], leaves[1], leaves[2], pattern, grad)
        y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
    # dX is a sparse product where the transpose is 2:4 too.
    assert [tuple(w.shape) for w in packed] == [(64, 128), (128, 64)][: 1 + transposable]
    for matrix in packed:
        assert int((matrix.reshape(-1, 4) != 0).sum(1).max()) == 2


def test_a_topology_that_is_not_two_of_four(packed):
    x, weight = torch.randn(4, 64), torch.randn(64, 64)
    active = torch.zeros(64, 64, dtype=torch.bool)
    active[0, :3] = True
    with pytest.raises(UserError, match=r"structure: \{type: n_m, n: 2, m: 4\}"):
        semi_structured.sparse_linear(x, weight, None, Pattern(active))
    assert not packed


def test_a_shape_that_tensor_cores_do_not_take(packed):
    weight = torch.randn(48, 64)
    with pytest.raises(UserError, match=r"a weight of \(48, 64\)"):
        semi_structured.sparse_linear(torch.randn(4, 64), weight, None, two_of_four(weight, False))


def test_where_it_cannot_run(monkeypatch):
    weight = torch.randn(64, 64)
    with pytest.raises(UserError, match=r"cannot run here: .* the device is cpu"):
        resolve_kernel("semi_structured", CPU)
    with pytest.raises(UserError, match=r"cannot run here: .* the device is cpu"):
        semi_structured.sparse_linear(torch.randn(4, 64), weight, None, two_of_four(weight, False))
    monkeypatch.setattr(torch.version, "hip", None)
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "7.5 is less than 8.0" in (semi_structured.why_not(CUDA) or "")
    capability = (8, 0)
    assert semi_structured.why_not(CUDA, torch.bfloat16) is None
    assert "torch.float32" in (semi_structured.why_not(CUDA, torch.float32) or "")
    capability = (9, 0)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "no cuSPARSELt" in (semi_structured.why_not(CUDA) or "")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert semi_structured.why_not(CUDA) is None
