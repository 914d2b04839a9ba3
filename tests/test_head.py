import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import head as head_module
from models.head import head_losses
from tests.conftest import worst

B, L, C, V = 3, 11, 8, 40


@pytest.fixture(params=[1, 6, 7, 1000])
def rows(request, monkeypatch):
    monkeypatch.setattr(head_module, "ROWS_AT_ONCE", request.param)
    return request.param


def make():
    torch.manual_seed(0)
    return torch.randn(B, L, C, requires_grad=True), nn.Linear(C, V), torch.randint(V, (B, L))


@pytest.mark.parametrize("soft", [False, True])
def test_losses_and_gradients_by_the_obvious_formula(soft, rows):
    features, head, tokens = make()
    targets = torch.randn(B, L, V) * 3 if soft else tokens
    leaves = [features, head.weight, head.bias]
    mean, losses, hits = head_losses(features, head, targets)
    found = torch.autograd.grad(2.5 * mean, leaves)
    log_p = head(features).log_softmax(-1)
    if soft:
        log_q = targets.log_softmax(-1)
        wanted = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        wanted = F.nll_loss(log_p.flatten(0, 1), tokens.flatten(), reduction="none").view(B, L)
    assert worst(losses, wanted.detach()) < 1e-5
    assert mean.item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert torch.equal(hits.bool(), log_p.argmax(-1) == (targets.argmax(-1) if soft else tokens))
    assert not losses.requires_grad
    assert not hits.requires_grad
    for a, b in zip(found, torch.autograd.grad(2.5 * wanted.mean(), leaves), strict=True):
        assert worst(a, b) < 1e-5


def test_every_chunk_is_shown_once(rows):
    features, head, tokens = make()
    seen = []

    def look(start, end, logits, linear):
        assert torch.equal(linear(features[:, start:end]), logits)
        seen.append((start, end, logits))

    head_losses(features, head, tokens, look)
    assert [start for start, _, _ in seen] == [0, *(end for _, end, _ in seen[:-1])]
    assert seen[-1][1] == L
    assert worst(torch.cat([logits for _, _, logits in seen], 1), head(features)) < 1e-6


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > self.size:
                self.size = x.untyped_storage().nbytes()
        return out


def test_the_logits_of_all_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(head_module, "ROWS_AT_ONCE", 2 * B)
    features, head, tokens = make()
    with Largest() as largest:
        head_losses(features, head, tokens)[0].backward()
    assert largest.size <= max(4 * 2 * B * V, 4 * C * V)
    with Largest() as largest:
        F.cross_entropy(head(features).flatten(0, 1), tokens.flatten()).backward()
    assert largest.size >= 4 * B * L * V


def test_without_gradient_none_is_made(monkeypatch):
    features, head, tokens = make()
    with torch.no_grad():
        mean, losses, _ = head_losses(features, head, tokens)
    assert mean.item() == pytest.approx(losses.mean().item())
    assert not mean.requires_grad


def test_half_precision_keeps_losses_in_fp32():
    features, head, tokens = make()
    exact = head_losses(features, head, tokens)[0]
    exact_gradient = torch.autograd.grad(exact, head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mean, losses, _ = head_losses(features, head, tokens)
    assert losses.dtype == torch.float32
    assert mean.item() == pytest.approx(exact.item(), rel=1e-2)
    gradient, d_features = torch.autograd.grad(mean, [head.weight, features])
    assert gradient.dtype == d_features.dtype == torch.float32
    assert worst(gradient, exact_gradient) < 0.03


def test_a_second_derivative_is_refused():
    """The gradient is made in the forward, so there is nothing to differentiate it by: not zero, but an error."""
    features, head, tokens = make()
    mean, _, _ = head_losses(features, head, tokens)
    (gradient,) = torch.autograd.grad(mean, features, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
