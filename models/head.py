"""The categorical head: losses of tokens, and tokens sampled on the way, without the logits of all tokens at once.

Legend: B batch, L tokens, C width, V codebook rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.sampling import SamplingConfig
from models.scales import ScaleSchedule

ROWS_AT_ONCE = 2048  # rows of logits that exist at a time


@dataclass(frozen=True)
class Sampler:
    """Settings to sample the tokens start…end of a parallel pass from its own logits, all scales at once (Eq. 5)."""

    start: int
    end: int
    top_k: int = 1  # 1 is greedy
    top_p: float = 0.0
    uniforms: Tensor | None = None  # (B, L); None when greedy
    unconditional: Tensor | None = None  # (B, end, C) features of the unconditional class, to guide by
    weights: Tensor | None = None  # (end, 1) guidance weight of each token
    keep_logits: bool = False

    def guided(self, unconditional: Tensor, weights: Tensor) -> Sampler:
        """A copy with guidance by the unconditional class."""
        return replace(self, unconditional=unconditional, weights=weights)


class Prediction(NamedTuple):
    """Result of a parallel pass at the tokens (B, L) that it was asked for. Only `loss` carries a gradient."""

    loss: Tensor  # mean over the tokens that count
    losses: Tensor  # (B, L)
    correct: Tensor  # (B, L) the likeliest token is the target
    sampled: Tensor | None = None  # (B, L); -1 where nothing was sampled, the target where a token does not count
    agreement: Tensor | None = None  # share of the sampled tokens that are the likeliest
    accuracy: Tensor | None = None  # share of the sampled tokens that are the targets
    logits: Tensor | None = None  # (B, end - start, V) what was sampled from, if the sampler keeps it
    token_weights: Tensor | None = None  # (B, L) of each in the loss, 0: none; None: all alike

    def targets(self, kind: str, truth: Tensor, schedule: ScaleSchedule, first: int) -> Tensor:
        """Targets of a second pass at the scales from number `first` on, by --csf_target: tokens or logits."""
        found = {"teacher": self.sampled, "ground_truth": truth, "teacher_soft": self.logits}[kind]
        return found[:, schedule.offsets[first] - schedule.total :]

    def shares(self) -> dict[str, Tensor]:
        """Shares of the sampled tokens, by name, to log."""
        return {"agreement": self.agreement, "accuracy": self.accuracy}  # type: ignore[dict-item]

    def metrics(self, schedule: ScaleSchedule, first: int = 0) -> dict[str, Tensor]:
        """Mean loss and accuracy of each scale from number `first` on."""
        found, lengths = {}, schedule.lengths[first:]
        losses_of, correct_of = (x.split(lengths, dim=1) for x in (self.losses, self.correct))
        weights_of = [None] * len(lengths) if self.token_weights is None else self.token_weights.split(lengths, dim=1)
        for s, losses, correct, counts in zip(schedule.sides[first:], losses_of, correct_of, weights_of, strict=True):
            found[f"loss_side/{s}"] = weighted_mean(losses, counts)
            found[f"accuracy_side/{s}"] = weighted_mean(correct, counts)
        return found


class CategoricalHead(nn.Linear):
    """Features (…, C) → logits (…, V) over the codebook."""

    label_smoothing = 0.0  # in training: the share of a target's probability that goes to all tokens alike

    @staticmethod
    def sampler(draw: SamplingConfig, start: int, end: int, shape: tuple[int, int], device: torch.device) -> Sampler:
        """Settings by which the tokens start…end of a pass (B, L) = `shape` are sampled, without guidance."""
        uniforms = None if draw.top_k == 1 else torch.rand(shape, device=device)
        return Sampler(start, end, draw.top_k, draw.top_p, uniforms)

    def predict(
        self, features: Tensor, targets: Tensor, sampler: Sampler | None = None, token_weights: Tensor | None = None
    ) -> Prediction:
        """Cross-entropy on target tokens, or the KL divergence from the distributions of target logits.

        Computes, scores and frees logits chunk by chunk of tokens. The gradient of the mean loss is computed on the
        way, so that backward needs no logits either.

        Args:
            features: (B, L, C).
            targets: tokens (B, L) or logits (B, L, V).
            sampler: sample tokens from the same logits, too.
            token_weights: (B, L) in the mean loss, 0: it does not count; None: all alike.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        found = ChunkedLoss.apply(
            features, self.weight, self.bias, targets, sampler, token_weights, smoothing, torch.is_grad_enabled()
        )
        return Prediction(*found, token_weights)  # type: ignore[call-arg]


def chunks(batch: int, length: int) -> list[tuple[int, int]]:
    """Spans of tokens, of at most ROWS_AT_ONCE rows each."""
    size = max(1, ROWS_AT_ONCE // batch)
    return [(a, min(a + size, length)) for a in range(0, length, size)]


def weighted_mean(values: Tensor, token_weights: Tensor | None) -> Tensor:
    """The mean of values (B, n), weighted by the tokens' weights (B, n)."""
    return values.float().mean() if token_weights is None else (values * token_weights).sum() / token_weights.sum()


def loss_and_gradient(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits (B, n, V), and tokens (B, n) or logits (B, n, V) → losses (B, n) and gradients (B, n, V), in fp32.

    `smoothing` gives tokens' distribution that much of the uniform one.
    """
    log_p = logits.float().log_softmax(-1)
    if target.ndim == 2:
        index = target.unsqueeze(-1)
        losses = -log_p.gather(-1, index).squeeze(-1)
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * log_p.mean(-1)
        gradient = log_p.exp_()
        if smoothing:
            gradient -= smoothing / logits.shape[-1]
        return losses, gradient.scatter_add_(-1, index, torch.full_like(losses, smoothing - 1).unsqueeze(-1))
    log_q = target.float().log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp_().sub_(q)


class ChunkedLoss(torch.autograd.Function):
    """`CategoricalHead.predict`, with the gradient of the mean made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        sampler: Sampler | None,
        token_weights: Tensor | None,
        smoothing: float,
        gradients: bool,
    ) -> tuple[Tensor | None, ...]:
        kind = features.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
        w, b = weight.to(dtype), bias.to(dtype)
        losses, correct = (features.new_empty(features.shape[:2], dtype=torch.float32) for _ in range(2))
        d_features = torch.empty_like(features, dtype=dtype) if gradients else None
        d_weight, d_bias = (torch.zeros_like(x, dtype=torch.float32) if gradients else None for x in (weight, bias))
        samples = Samples(sampler, features, lambda x: F.linear(x.to(dtype), w, b)) if sampler else None
        with torch.autocast(kind, enabled=False):
            for start, end in chunks(*features.shape[:2]):
                x = features[:, start:end].to(dtype)
                logits = F.linear(x, w, b)
                if samples is not None:
                    samples.add(start, end, logits)
                target = targets[:, start:end]
                wanted = target if target.ndim == 2 else target.argmax(-1)
                correct[:, start:end] = logits.argmax(-1) == wanted
                losses[:, start:end], gradient = loss_and_gradient(logits, target, smoothing)
                if gradients:
                    gradient = gradient if token_weights is None else gradient.mul_(token_weights[:, start:end, None])
                    gradient = gradient.to(dtype).flatten(0, 1)  # (rows, V)
                    d_features[:, start:end] = (gradient @ w).view_as(x)
                    add_product(d_weight, gradient.T, x.flatten(0, 1))
                    d_bias += gradient.sum(0, dtype=torch.float32)
        if gradients:
            ctx.save_for_backward(d_features, d_weight, d_bias)
            ctx.dtypes = (features.dtype, weight.dtype, bias.dtype)
            ctx.count = losses.numel() if token_weights is None else token_weights.sum()
        found = samples.result(targets, token_weights) if samples is not None else (None,) * 4
        ctx.mark_non_differentiable(*(x for x in (losses, correct, *found) if x is not None))
        return weighted_mean(losses, token_weights), losses, correct, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        scale = d_mean / ctx.count
        found = (g.to(dtype) * scale for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *found, None, None, None, None, None


class Samples:
    """Tokens sampled chunk by chunk of the logits, as a sampler says."""

    def __init__(self, sampler: Sampler, features: Tensor, linear: Callable[[Tensor], Tensor]):
        """`linear` is the head in the working precision."""
        self.sampler, self.linear = sampler, linear
        self.tokens = torch.full(features.shape[:2], -1, dtype=torch.long, device=features.device)
        self.likeliest = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.logits: list[Tensor] = []

    def add(self, start: int, end: int, logits: Tensor) -> None:
        """Sample the tokens start…end, as far as they are wanted, from their logits (B, end - start, V)."""
        wanted = self.sampler
        a, b = max(start, wanted.start), min(end, wanted.end)
        if a >= b:
            return
        logits = logits[:, a - start : b - start]
        best = logits.argmax(-1)
        if wanted.unconditional is not None:
            logits = guide(logits, self.linear(wanted.unconditional[:, a:b]), wanted.weights[a:b])
        uniforms = None if wanted.uniforms is None else wanted.uniforms[:, a:b]
        self.tokens[:, a:b] = sample_tokens(logits, wanted.top_k, wanted.top_p, uniforms)
        self.likeliest[:, a:b] = self.tokens[:, a:b] == best
        if wanted.keep_logits:
            self.logits.append(logits)

    def result(self, targets: Tensor, token_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `Prediction`: sampled, agreement, accuracy, logits."""
        span = slice(self.sampler.start, self.sampler.end)
        counts = None if token_weights is None else token_weights[:, span]
        agreement, accuracy = weighted_mean(self.likeliest[:, span], counts), None
        if targets.ndim == 2:
            accuracy = weighted_mean(self.tokens[:, span] == targets[:, span], counts)
        # Targets that are distributions have no token to stand in for what does not count.
        tokens = (
            self.tokens
            if token_weights is None or targets.ndim == 3
            else torch.where(token_weights.bool(), self.tokens, targets)
        )
        return tokens, agreement, accuracy, torch.cat(self.logits, dim=1) if self.logits else None


def guide(cond: Tensor, uncond: Tensor, weight: float | Tensor) -> Tensor:
    """(1 + w)·cond − w·uncond, in fp32: half precision would be coarse against the differences."""
    return (1 + weight) * cond.float() - weight * uncond.float()


def sample_tokens(logits: Tensor, top_k: int, top_p: float, uniforms: Tensor | None = None) -> Tensor:
    """Sample one token a row after top-k, then top-p on the renormalised rest.

    The draw inverts the cumulative distribution in vocabulary order at a uniform number that the caller supplies,
    so the token depends on nothing but the logits and that number: not on the batch, the rank or the device.

    Args:
        logits: (…, V), never written.
        top_k: keep every logit ≥ the k-th largest, ties included; 1 is greedy, 0 keeps all.
        top_p: drop the tokens whose ascending cumulative probability is ≤ 1 − p, never the largest; tokens that
            tie with the last one kept stay. 0 (or 1) keeps all.
        uniforms: (…,) in [0, 1). May be None when greedy.

    Returns: (…,) int64.
    """
    if top_k == 1:
        return logits.argmax(-1)
    # float64: a parallel float32 sum is not quite monotone, and could land on a token that was cut.
    cumulative = kept_weights(logits, top_k, top_p).double().cumsum(-1)
    target = (1 - uniforms.double().unsqueeze(-1)) * cumulative[..., -1:]  # in (0, total]
    # Past the end only when a logit is not a number: a token all the same, so that the loss can tell.
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def kept_weights(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (…, V) → exp(logit - largest logit) of the tokens that top-k and top-p keep, 0 of the others."""
    vocabulary = logits.shape[-1]
    if not 0 <= top_p <= 1 or top_k < 0:
        raise ValueError(f"need top_k ≥ 0 and 0 ≤ top_p ≤ 1, got {top_k} and {top_p}")
    logits = logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()  # the largest is 1
    nucleus = 0 < top_p < 1
    if 0 < top_k < vocabulary or nucleus:
        # Top-k comes before the sort that top-p needs, so that only k values are ever sorted.
        ranked = weights.topk(min(top_k or vocabulary, vocabulary), dim=-1).values  # descending
        cut = ranked[..., -1:]
        if nucleus:
            mass = weights.masked_fill(weights < cut, 0).sum(-1, keepdim=True)
            before = ranked.cumsum(-1) - ranked  # the mass ahead of each; 1 − before is its ascending cumulative
            kept = (before < top_p * mass).sum(-1, keepdim=True)
            cut = ranked.gather(-1, kept.clamp_(min=1) - 1)
        weights = weights.masked_fill_(weights < cut, 0)
    return weights


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the total is in fp32 whatever the factors are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
