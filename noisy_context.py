"""Rival of SAR: teacher forcing on a corrupted context, the field's usual cure for exposure bias.

Tokens are corrupted before they are shifted up; targets stay true. Per scale it is the self-correction of Infinity
(arXiv 2412.04431), per image the noisy context of reAR. FlexVAR's codes of a scale do not depend on those before it;
VAR's do, and are quantised anew, so that they make up for what is wrong before them.

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from models.scales import ScaleSchedule, to_tokens_of
from trainer import Metrics, Trainer
from utils.data.datasets import CodeBatch

LEVELS = 3  # of noise per scale: shares 0, 1/3, 2/3 and all of --noise_max
FALLING = 0.75  # share of the run in which noise per image falls to nothing


class NoisyContext(Trainer):
    """Mean cross-entropy on ground truth, from inputs of which a share of the tokens is replaced."""

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        if self.config.sar.noise_max == 0:
            return super().compute_loss(batch, schedule)
        truth = batch.tokens(schedule)
        fed = self.corrupt(truth, schedule)
        targets = self.pathway.corrected(fed, truth, schedule)
        found = self.predict(batch.labels, self.inputs(fed, schedule), targets, schedule)
        corrupted = (fed != truth).float().mean()
        return found.loss, {"loss": found.loss.detach(), "corrupted": corrupted, **found.metrics(schedule)}

    def corrupt(self, truth: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Tokens (B, L) with a share of them replaced."""
        sar, shares = self.config.sar, self.shares(len(truth), len(schedule)).to(truth.device, non_blocking=True)
        hit = torch.rand(truth.shape, device=truth.device) < to_tokens_of(shares, schedule.lengths)
        if sar.noise == "uniform":
            others = torch.randint(self.model.config.codebook_size, truth.shape, device=truth.device)
        else:
            near = self.neighbours[truth]  # (B, L, K)
            place = torch.randint(near.shape[-1], (*truth.shape, 1), device=truth.device)
            others = near.gather(-1, place).squeeze(-1)
        return torch.where(hit, others, truth)

    def shares(self, batch: int, scales: int) -> Tensor:
        """Share of the tokens to replace, of each image and scale (B, S)."""
        sar = self.config.sar
        if sar.noise_per == "scale":
            return torch.randint(LEVELS + 1, (batch, scales)) * (sar.noise_max / LEVELS)
        left = max(0.0, 1 - self.step / (FALLING * self.total_steps))
        return (sar.noise_max * left * torch.rand(batch, 1)).expand(-1, scales)

    @cached_property
    def neighbours(self) -> Tensor:
        """The nearest other rows of each row of the codebook (V, K), made when they are first asked for."""
        every = torch.arange(self.model.config.codebook_size, device=self.ranks.device)
        rows, k = self.pathway.embed(every[None])[0].float(), self.config.sar.noise_neighbours
        if k >= len(rows):
            raise ValueError(f"--noise_neighbours {k}: a codebook of {len(rows)} rows has fewer others")
        found = []
        for part, own in zip(rows.split(1024), every.split(1024), strict=True):
            apart = torch.cdist(part, rows).scatter(1, own[:, None], torch.inf)  # no row is its own neighbour
            found.append(apart.topk(k, largest=False).indices)
        return torch.cat(found)
