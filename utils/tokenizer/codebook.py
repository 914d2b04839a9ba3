"""The use of a codebook: how many of its rows are chosen, how evenly, and new values for those that are not.

Legend: S sides, V codebook rows, D codebook width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def histogram(codes: Tensor, rows: int) -> Tensor:
    """Counts of how often each row was chosen (V,) int64. Nothing waits for the device, unlike with torch.bincount."""
    flat = codes.flatten()
    return torch.zeros(rows, dtype=torch.long, device=codes.device).scatter_add_(0, flat, torch.ones_like(flat))


def usage(counts: Tensor) -> Tensor:
    """Share of the rows that were chosen at all: counts (…, V) → (…)."""
    return (counts > 0).double().mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the choices, from 1 (always the same row) to V (all alike): counts (…, V) → (…)."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(p).sum(-1).exp()


class CodebookUse(nn.Module):
    """Counts of a window of steps, over all ranks. They are part of a run's checkpoints."""

    counts: Tensor  # (S, V)

    def __init__(self, sides: Sequence[int], rows: int):
        super().__init__()
        self.sides = tuple(sides)
        self.register_buffer("counts", torch.zeros(len(self.sides), rows, dtype=torch.long))  # (S, V)

    def metrics(self) -> dict[str, Tensor]:
        """Usage and perplexity of each side."""
        measures = {"usage_side": usage(self.counts), "perplexity_side": perplexity(self.counts)}
        return {f"{name}/{s}": value[i] for name, value in measures.items() for i, s in enumerate(self.sides)}

    def unused(self) -> Tensor:
        """Rows that no side chose (V,)."""
        return self.counts.sum(0) == 0


@torch.no_grad()
def revive(codebooks: Sequence[Tensor], dead: Tensor, offers: Tensor) -> Tensor:
    """Put the offered vectors (V, D) in place of the dead rows (V,) of codebooks (V, D). Returns how many that were.

    Offers that are not finite are not taken.
    """
    dead = dead & offers.isfinite().all(-1)
    for rows in codebooks:
        rows.copy_(torch.where(dead[:, None], offers.to(rows.dtype), rows))
    return dead.sum()
