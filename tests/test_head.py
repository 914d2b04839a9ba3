import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import head as head_module
from models.head import CategoricalHead, Sampler, sample_tokens
from tests.conftest import worst

B, L, C, V = 3, 11, 8, 40


@pytest.fixture(params=[1, 6, 7, 1000])
def rows(request, monkeypatch):
    monkeypatch.setattr(head_module, "ROWS_AT_ONCE", request.param)
    return request.param


def make():
    torch.manual_seed(0)
    return torch.randn(B, L, C, requires_grad=True), CategoricalHead(C, V), torch.randint(V, (B, L))


@pytest.mark.parametrize("soft", [False, True])
def test_losses_and_gradients_by_the_obvious_formula(soft, rows):
    features, head, tokens = make()
    targets = torch.randn(B, L, V) * 3 if soft else tokens
    leaves = [features, head.weight, head.bias]
    mean, losses, hits, *_ = head.predict(features, targets)
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


@pytest.mark.parametrize("span", [(0, L), (2, 7)])
def test_tokens_are_sampled_from_the_same_logits(span, rows):
    """Of the span alone, after guidance, at each token's own uniform number; the logits are kept."""
    features, head, tokens = make()
    uniforms, unconditional, weights = torch.rand(B, L), torch.randn(B, L, C), torch.linspace(0, 2, L).unsqueeze(-1)
    a, b = span
    logits = head(features)
    for guided in (False, True):
        sampler = Sampler(a, b, 10, 0.9, uniforms, keep_logits=True)
        if guided:
            sampler = sampler.guided(unconditional[:, :b], weights[:b])
        found = head.predict(features, tokens, sampler)
        wanted = (1 + weights) * logits - weights * head(unconditional) if guided else logits
        assert worst(found.logits, wanted[:, a:b].detach()) < 1e-5
        assert torch.equal(found.sampled[:, a:b], sample_tokens(wanted, 10, 0.9, uniforms)[:, a:b])
        assert (found.sampled[:, :a] == -1).all()
        assert (found.sampled[:, b:] == -1).all()
        likeliest = (found.sampled == logits.argmax(-1))[:, a:b].float().mean()
        assert found.agreement.item() == pytest.approx(likeliest.item())
        assert found.accuracy.item() == pytest.approx((found.sampled == tokens)[:, a:b].float().mean().item())
    greedy = head.predict(features, tokens, Sampler(a, b))
    assert greedy.agreement == 1
    assert greedy.logits is None


def test_masked_tokens_count_for_nothing(rows):
    features, head, tokens = make()
    mask = (torch.rand(B, L, generator=torch.Generator().manual_seed(1)) > 0.4).float()
    found = head.predict(features, tokens, Sampler(0, L), mask)
    each = F.cross_entropy(head(features).transpose(1, 2), tokens, reduction="none")
    wanted = each[mask.bool()].mean()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    leaves = [features, head.weight, head.bias]
    pairs = zip(torch.autograd.grad(found.loss, leaves), torch.autograd.grad(wanted, leaves), strict=True)
    assert all(worst(a, b) < 1e-5 for a, b in pairs)
    assert torch.equal(found.sampled, torch.where(mask.bool(), head(features).argmax(-1), tokens))


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
        head.predict(features, tokens).loss.backward()
    assert largest.size <= max(4 * 2 * B * V, 4 * C * V)
    with Largest() as largest:
        F.cross_entropy(head(features).flatten(0, 1), tokens.flatten()).backward()
    assert largest.size >= 4 * B * L * V


def test_without_gradient_none_is_made(monkeypatch):
    features, head, tokens = make()
    with torch.no_grad():
        mean, losses, *_ = head.predict(features, tokens)
    assert mean.item() == pytest.approx(losses.mean().item())
    assert not mean.requires_grad


def test_half_precision_keeps_losses_in_fp32():
    features, head, tokens = make()
    exact = head.predict(features, tokens).loss
    exact_gradient = torch.autograd.grad(exact, head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mean, losses, *_ = head.predict(features, tokens)
    assert losses.dtype == torch.float32
    assert mean.item() == pytest.approx(exact.item(), rel=1e-2)
    gradient, d_features = torch.autograd.grad(mean, [head.weight, features])
    assert gradient.dtype == d_features.dtype == torch.float32
    assert worst(gradient, exact_gradient) < 0.03


def test_a_second_derivative_is_refused():
    """The gradient is made in the forward, so there is nothing to differentiate it by: not zero, but an error."""
    features, head, tokens = make()
    mean = head.predict(features, tokens).loss
    (gradient,) = torch.autograd.grad(mean, features, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
