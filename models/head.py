"""Reading the head in chunks: the loss of every token without the logits of all tokens.

Legend: B batch, L tokens, C width, V codebook rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS_AT_ONCE = 2048  # rows of logits that exist at a time

Linear = Callable[[Tensor], Tensor]  # the head in the working precision: (…, C) → (…, V)
Look = Callable[[int, int, Tensor, Linear], None]  # a, b, the logits (B, b-a, V) of these tokens, the head


def head_losses(
    features: Tensor, head: nn.Linear, targets: Tensor, look: Look | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of head(features) on target tokens, or its KL divergence from the target logits' distributions.

    Chunk by chunk of tokens, the logits are made, judged and forgotten. The gradient of the mean loss is computed on
    the way, so that backward needs no logits either.

    Args:
        features: (B, L, C).
        head: C → V.
        targets: tokens (B, L) or logits (B, L, V).
        look: is shown the logits of each chunk; it must not write them.

    Returns: the mean loss; without gradient the losses (B, L), and whether the likeliest token is the target's (B, L).
    """
    return HeadLosses.apply(features, head.weight, head.bias, targets, look, torch.is_grad_enabled())


def chunks(batch: int, length: int) -> list[tuple[int, int]]:
    """Spans of tokens, of at most ROWS_AT_ONCE rows each."""
    size = max(1, ROWS_AT_ONCE // batch)
    return [(a, min(a + size, length)) for a in range(0, length, size)]


def judge(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, n, V), and tokens (B, n) or logits (B, n, V) → losses (B, n) and gradients (B, n, V), in fp32."""
    log_p = logits.float().log_softmax(-1)
    if target.ndim == 2:
        index = target.unsqueeze(-1)
        losses = -log_p.gather(-1, index).squeeze(-1)
        gradient = log_p.exp_()
        return losses, gradient.scatter_add_(-1, index, torch.full_like(losses, -1.0).unsqueeze(-1))
    log_q = target.float().log_softmax(-1)
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp_().sub_(q)


class HeadLosses(torch.autograd.Function):
    """`head_losses`, with the gradient of the mean made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx, features: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, look: Look | None, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = features.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else features.dtype
        w, b = weight.to(dtype), bias.to(dtype)
        losses, hits = (features.new_empty(features.shape[:2], dtype=torch.float32) for _ in range(2))
        d_features = torch.empty_like(features, dtype=dtype) if gradients else None
        d_weight, d_bias = (torch.zeros_like(x, dtype=torch.float32) if gradients else None for x in (weight, bias))
        with torch.autocast(kind, enabled=False):
            for start, end in chunks(*features.shape[:2]):
                x = features[:, start:end].to(dtype)
                logits = F.linear(x, w, b)
                if look is not None:
                    look(start, end, logits, lambda x: F.linear(x.to(dtype), w, b))
                target = targets[:, start:end]
                best = target if target.ndim == 2 else target.argmax(-1)
                hits[:, start:end] = logits.argmax(-1) == best
                losses[:, start:end], gradient = judge(logits, target)
                if gradients:
                    gradient = gradient.to(dtype).flatten(0, 1)  # (rows, V)
                    d_features[:, start:end] = (gradient @ w).view_as(x)
                    add_product(d_weight, gradient.T, x.flatten(0, 1))
                    d_bias += gradient.sum(0, dtype=torch.float32)
        if gradients:
            ctx.save_for_backward(d_features, d_weight, d_bias)
            ctx.dtypes = (features.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(losses, hits)
        return losses.mean(), losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mean: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        d_features, d_weight, d_bias = ctx.saved_tensors
        scale = d_mean / d_features.shape[:2].numel()
        found = (g.to(dtype) * scale for g, dtype in zip((d_features, d_weight, d_bias), ctx.dtypes, strict=True))
        return *found, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; the total is in fp32 whatever the factors are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
