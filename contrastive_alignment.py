"""Rival of SAR: condition-contrastive alignment (CCA, arXiv 2410.09347), which makes guidance superfluous.

The likelihood of an image under its own class is raised, against a frozen copy of the model that the run starts from,
and that under another image's class is lowered:

    L = -log σ(β·Δ(x, c)) - λ·log σ(-β·Δ(x, c')),   Δ(x, c) = log p(x | c) - log p_frozen(x | c)

Legend: B batch, L tokens of a schedule.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from models.flexvar import FlexVAR
from models.scales import ScaleSchedule
from models.weights import digest_of, load_flexvar
from trainer import Inputs, Metrics, Trainer
from utils.data.datasets import CodeBatch


class ContrastiveAlignment(Trainer):
    """L over images and their classes, and images and the class of the image before them in the batch."""

    @cached_property
    def frozen(self) -> FlexVAR:
        """The model that the run started from. Raises ValueError where no image can have another's class."""
        if self.micro_batch < 2 or self.model.config.num_classes < 2:
            raise ValueError(
                f"--training_mode cca takes other classes from the same micro-batch: it needs two images or more (here "
                f"{self.micro_batch}; --micro_batch), and two classes or more (here {self.model.config.num_classes})"
            )
        return load_flexvar(self.config.model.init_ckpt).to(self.ranks.device).eval().requires_grad_(False)

    def invariants(self) -> dict[str, object]:
        frozen = digest_of(self.frozen) if self.config.sar.cca_lambda else None
        return {**super().invariants(), "frozen_sha256": frozen}

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        if self.config.sar.cca_lambda == 0:
            return super().compute_loss(batch, schedule)
        labels, tokens = batch.labels, batch.tokens(schedule)
        inputs, others = self.inputs(tokens, schedule), labels.roll(1)
        null = self.model.null_class  # of a dropped class only the first half: the unconditional model stays one
        counts = ((others != labels) & (others != null) & (labels != null)).float()
        own, gain, found = self.half(labels, inputs, tokens, schedule, torch.ones_like(counts), 1)
        other, loss, _ = self.half(others, inputs, tokens, schedule, counts, -1)
        value = own + self.config.sar.cca_lambda * other
        return value, {"loss": value.detach(), "gain": gain, "gain_of_others": loss, **found}

    def half(
        self, labels: Tensor, inputs: Inputs, tokens: Tensor, schedule: ScaleSchedule, counts: Tensor, sign: int
    ) -> tuple[Tensor, Tensor, Metrics]:
        """The mean of -log σ(sign·β·Δ) over the images that count (B,), the mean Δ, and metrics by scale.

        Its gradient is that of the images' cross-entropies, each weighted by sign·β·σ(-sign·β·Δ), so that the head can
        go through the logits chunk by chunk.
        """
        beta, head = self.config.sar.cca_beta, self.model.head
        features = self.network(labels, inputs, schedule, features=True)
        with torch.no_grad():
            frozen = self.frozen(labels, inputs, schedule, tokens).losses.sum(1)
            plain = head.predict(features.detach(), tokens)
            delta = frozen - plain.losses.sum(1)  # (B,)
            number = counts.sum().clamp_min(1)
            weights = counts * beta * torch.sigmoid(-sign * beta * delta) / number
            value = (counts * -F.logsigmoid(sign * beta * delta)).sum() / number
            gain = (counts * delta).sum() / number
            total = weights.sum()
            shares = torch.where(total > 0, weights / total, 1 / len(weights)) * len(weights)  # (B,), 1 on average
        loss = head.predict(features, tokens, token_weights=shares[:, None].expand(tokens.shape)).loss
        surrogate = sign * total * tokens.shape[1] * loss  # Σ of weight · cross-entropy
        return value + surrogate - surrogate.detach(), gain, plain.metrics(schedule) if sign > 0 else {}
