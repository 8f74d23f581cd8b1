"""The loss in chunks against the cross-entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import PeakMemory
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.model.loss import IGNORE, head_loss


def operands(tokens: int, dtype=torch.float64, width: int = 7, vocabulary: int = 23):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::3] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def results(make, hidden, weight, targets) -> list[torch.Tensor]:
    """The loss and its gradients, scaled from outside as accumulation does."""
    loss = make(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(0.25 * loss, (hidden, weight))]


def whole(reduction: str):
    def loss(hidden, weight, targets):
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)

    return loss


@given(
    tokens=st.integers(2, 20), chunk=st.integers(1, 25), reduction=st.sampled_from(["mean", "sum"])
)
@settings(deadline=None, max_examples=40)
def test_loss_and_gradients(tokens, chunk, reduction):
    given_, expected = (
        results(make, *operands(tokens))
        for make in (lambda *o: head_loss(*o, chunk, reduction), whole(reduction))
    )
    for got, wanted in zip(given_, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_narrower_types(dtype, tolerance):
    """As near to fp64 as the loss of all logits in the same type."""
    exact = results(whole("mean"), *operands(20))
    hidden, weight, targets = operands(20, dtype)
    made = results(lambda *o: head_loss(*o, 6, "mean"), hidden, weight, targets)
    assert [tensor.dtype for tensor in made] == [torch.float32, dtype, dtype]
    for got, wanted in zip(made, exact, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


def test_without_gradients_none_are_made():
    hidden, weight, targets = operands(9)
    with torch.no_grad():
        loss = head_loss(hidden, weight, targets, 4, "sum")
    torch.testing.assert_close(loss, whole("sum")(hidden, weight, targets).detach())
    frozen = head_loss(hidden, weight.detach(), targets, 4, "sum")
    (gradient,) = torch.autograd.grad(frozen, hidden)
    expected = torch.autograd.grad(whole("sum")(hidden, weight, targets), hidden)[0]
    torch.testing.assert_close(gradient, expected)


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = operands(9)
    loss = head_loss(hidden, weight, targets, 4, "mean")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_nothing_to_score_is_not_finite():
    hidden, weight, targets = operands(5)
    assert head_loss(hidden, weight, torch.full_like(targets, IGNORE), 2, "mean").isnan()


@pytest.mark.parametrize("d_embed", [None, 8])
def test_a_model_with_chunks(d_embed):
    """The same losses and gradients, and never all logits."""
    dims = {"n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 32, "n_positions": 64}
    ids = torch.randint(997, (4, 64), generator=torch.Generator().manual_seed(0))
    losses, peaks, gradients = [], [], []
    for chunk in (None, 50):
        model = GPT(GPTConfig(**dims, vocab_size=997, d_embed=d_embed, loss_chunk=chunk))
        model.init_weights(0)
        with PeakMemory() as peak:
            loss = model(ids, ids)
            loss.backward()
        losses.append(loss.detach())
        peaks.append(peak.largest)
        gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(
            model(ids, ids, reduction="none").mean().detach(), losses[-1], rtol=1e-6, atol=0
        )
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert peaks[0] == 4 * 256 * 997
    assert peaks[1] < peaks[0] / 3
