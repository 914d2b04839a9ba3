"""Self-Autoregressive Refinement: Stagger-Scale Rollout and the Contrastive Student-Forcing Loss (Algorithm 1).

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sampling import Guidance, guide, sample_tokens
from models.scales import ScaleSchedule, shift_all
from trainer import Metrics, Trainer, scale_losses
from utils.config import SARConfig
from utils.data import CodeBatch

DRAWN_AT_ONCE = 128  # tokens of an image: the sampler needs several copies of their logits


def rollout_guidance(sar: SARConfig) -> Guidance:
    """The guidance of tokens drawn in training."""
    return Guidance("half_ramp", sar.sf_cfg_scale) if sar.rollout == "cfg" else Guidance("none")


class SARTrainer(Trainer):
    """L = L_TF + γ·L_CSF (paper Eq. 11).

    1. Teacher forcing (Eq. 4): ground truth, shifted up, through the network.
    2. Stagger-scale rollout (Eq. 5–8): tokens drawn from the teacher's logits, shifted up one scale exactly as
       ground truth is, feed one second pass.
    3. Contrastive student forcing (Eq. 9–10): the second pass predicts, at scales 2…N, the tokens that the teacher
       drew there.
    """

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        gamma = self.gamma()
        teacher = self.teacher_pass(batch, schedule)
        if gamma == 0 or len(schedule) < 2:
            return teacher.loss, teacher.metrics
        logits = self.guided(teacher.logits.detach(), teacher.inputs, batch.labels, schedule)
        rollout = self.draw(logits)  # (B, L)
        targets = {"teacher": rollout, "ground_truth": teacher.tokens, "teacher_soft": logits}
        csf_loss, metrics = self.student_loss(rollout, targets[self.config.sar.csf_target], batch.labels, schedule)
        loss = teacher.loss + gamma * csf_loss
        return loss, {
            **teacher.metrics,
            **metrics,
            "loss": loss.detach(),
            "loss_tf": teacher.loss.detach(),
            "loss_csf": csf_loss.detach(),
            "rollout_agreement": (rollout == teacher.logits.argmax(-1)).float().mean(),
            "rollout_accuracy": (rollout == teacher.tokens).float().mean(),
        }

    def gamma(self) -> float:
        """γ at this step: --csf_weight, reached linearly over the first --csf_ramp of the run."""
        sar = self.config.sar
        ramp = sar.csf_ramp * self.total_steps
        return sar.csf_weight * min(1.0, self.step / ramp) if ramp else sar.csf_weight

    @torch.no_grad()
    def guided(self, logits: Tensor, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule) -> Tensor:
        """The teacher's logits (B, L, V) under the rollout's guidance, without gradient."""
        weights = rollout_guidance(self.config.sar).weights(schedule.sides)
        if not any(weights):
            return logits
        # Only the unconditional half is new: the conditional one is there.
        unconditional = self.model(torch.full_like(labels, self.model.null_class), inputs, schedule)
        halves = zip(schedule.split(logits), schedule.split(unconditional), strict=True)
        return torch.cat([guide(c, u, w) for (c, u), w in zip(halves, weights, strict=True)], dim=1)

    @torch.no_grad()
    def draw(self, logits: Tensor) -> Tensor:
        """Tokens (B, L) from logits (B, L, V), by --rollout."""
        sar = self.config.sar
        if sar.rollout == "argmax":
            return logits.argmax(-1)
        uniforms = torch.rand(logits.shape[:-1], device=logits.device)
        parts = zip(logits.split(DRAWN_AT_ONCE, 1), uniforms.split(DRAWN_AT_ONCE, 1), strict=True)
        return torch.cat([sample_tokens(x, sar.sf_top_k, sar.sf_top_p, u) for x, u in parts], dim=1)

    def student_loss(
        self, rollout: Tensor, targets: Tensor, labels: Tensor, schedule: ScaleSchedule
    ) -> tuple[Tensor, Metrics]:
        """The second pass on the rollout (B, L) shifted up, against targets (B, L) or (B, L, V) at the scales it fed.

        --ssr all (paper): every scale from its predecessor's rollout, in one pass of the whole schedule.
        --ssr last (released code): only the last transition, as the two-scale sequence [1, s_N] whose first token
        is the class embedding without pos_start. --ssr random: the same of a transition drawn anew each step.
        --ssr_steps n (with all): n such passes, each on the tokens drawn from the one before; the mean of their losses.
        """
        sar, n = self.config.sar, len(schedule)
        if sar.ssr == "all":
            fed, scales = slice(schedule.lengths[0], None), ScaleSchedule(schedule.sides[1:])  # scales 2…N
            losses: list[tuple[Tensor, Metrics]] = []
            while len(losses) < sar.ssr_steps:
                logits = self.network(labels, shift_all(rollout, self.codebook, schedule), schedule)
                losses.append(csf_losses(logits[:, fed], targets[:, fed], scales))
                if len(losses) < sar.ssr_steps:
                    rollout = self.draw(logits.detach())
        else:
            i = n - 1 if sar.ssr == "last" else random.Random(f"ssr/{self.config.run.seed}/{self.step}").randrange(1, n)
            pair = ScaleSchedule(schedule.sides[i - 1 : i + 1])
            drawn = torch.cat([rollout[:, schedule.span(i - 1)], rollout[:, schedule.span(i)]], dim=1)
            short, scales = ScaleSchedule((1, schedule.sides[i])), ScaleSchedule(schedule.sides[i : i + 1])
            logits = self.network(labels, shift_all(drawn, self.codebook, pair), short, start=False)
            losses = [csf_losses(logits[:, 1:], targets[:, schedule.span(i)], scales)]
        metrics = {f"student_{name}": value for name, value in losses[0][1].items()}
        return torch.stack([loss for loss, _ in losses]).mean(), metrics


def csf_losses(logits: Tensor, targets: Tensor, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
    """Cross-entropy against tokens (B, L), or KL from the distributions that logits (B, L, V) stand for."""
    if targets.ndim == 2:
        return scale_losses(logits, targets, schedule)
    _, metrics = scale_losses(logits.detach(), targets.argmax(-1), schedule)
    student, teacher = (x.float().log_softmax(-1).flatten(0, 1) for x in (logits, targets))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True), metrics
