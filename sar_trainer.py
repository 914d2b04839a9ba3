"""Self-Autoregressive Refinement: Stagger-Scale Rollout and the Contrastive Student-Forcing Loss (Algorithm 1).

Legend: B batch, L tokens of a schedule, V codebook rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.head import Prediction, Sampler
from models.sampling import Guidance, SamplingConfig
from models.scales import ScaleSchedule
from trainer import Inputs, Metrics, Trainer
from utils.config.training import FEEDING, SARConfig
from utils.data.datasets import CodeBatch


class SARTrainer(Trainer):
    """L = L_TF + γ·L_CSF (paper Eq. 11)."""

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        """Teacher forcing, a rollout of one stagger-scale step, and a second pass on it that imitates the teacher."""
        labels, tokens, gamma = batch.labels, batch.tokens(schedule), self.config.sar.csf_weight
        if gamma == 0 or len(schedule) < 2:
            return super().compute_loss(batch, schedule)
        # Eq. 4-5: ground truth, shifted up, through the network; tokens sampled from its logits, at all scales at once.
        inputs = self.inputs(tokens, schedule)
        teacher = self.predict(labels, inputs, tokens, schedule, sampler=self.rollout_sampler(labels, inputs, schedule))
        # Eq. 6-10: those tokens, shifted up one scale as ground truth is, through the network; it should predict, at
        # scales 2…N, what the teacher sampled there.
        student = self.student(labels, teacher, tokens, schedule)
        loss = teacher.loss + gamma * student.loss  # Eq. 11
        return loss, {**self.measured(teacher, student, schedule), "loss": loss.detach()}

    def student(self, labels: Tensor, teacher: Prediction, tokens: Tensor, schedule: ScaleSchedule) -> Prediction:
        """The second pass, and its loss at the scales that the rollout fed.

        --ssr all (paper): every scale from its predecessor's rollout, in one pass of the whole schedule.
        --ssr last (released code): only the last transition, as the two-scale sequence [1, s_N] whose first token
        is the class embedding without pos_start.
        --ssr_steps n (with all): n such passes, each on tokens sampled from the one before; the mean of their losses.
        --ssr_share: the others of its inputs are true. With --csf_target ground_truth that is scheduled sampling.
        --rollout_canvas (where a scale is fed with a sum): of the rollout's residuals, or of its last and true ones.
        """
        sar, fed = self.config.sar, self.mixed(teacher.sampled, tokens)
        truth = tokens if sar.rollout_canvas == "one_step" else None
        first = len(schedule) - 1 if sar.ssr == "last" else 1
        targets = self.targets(teacher, fed, tokens, schedule, first)
        if sar.ssr == "last":
            ends = ScaleSchedule((1, schedule.sides[-1]))
            inputs = self.inputs(fed, schedule, truth, first)
            return self.predict(labels, inputs, targets, ends, first=1, start=False)
        passes = []
        for more in reversed(range(sar.ssr_steps)):
            inputs = self.inputs(fed, schedule, truth)
            sampler = self.rollout_sampler(labels, inputs, schedule, first=1) if more else None
            passes.append(self.predict(labels, inputs, targets, schedule, first=1, sampler=sampler))
            fed = torch.cat([fed[:, : schedule.lengths[0]], passes[-1].sampled], dim=1) if more else fed
        return passes[0]._replace(loss=torch.stack([p.loss for p in passes]).mean())

    def mixed(self, sampled: Tensor, tokens: Tensor) -> Tensor:
        """Each token the rollout's with probability --ssr_share, else the true one (B, L)."""
        if self.config.sar.ssr_share == 1:
            return sampled
        mine = torch.rand(tokens.shape[:2], device=tokens.device) < self.config.sar.ssr_share
        return torch.where(mine if sampled.ndim == 2 else mine[..., None], sampled, self.pathway.own(tokens))

    def targets(self, teacher: Prediction, fed: Tensor, tokens: Tensor, schedule: ScaleSchedule, first: int) -> Tensor:
        """Targets of the second pass at the scales from number `first` on, by --csf_target."""
        sar = self.config.sar
        if sar.csf_target != "requantised":
            return teacher.targets(sar.csf_target, tokens, schedule, first)
        wanted = self.pathway.requantised(fed, tokens, schedule, one_step=sar.rollout_canvas == "one_step")
        return wanted[:, schedule.offsets[first] :]

    def rollout_sampler(self, labels: Tensor, inputs: Inputs, schedule: ScaleSchedule, first: int = 0) -> Sampler:
        """Settings by which a pass on these inputs, asked for the scales from number `first` on, samples (Eq. 5).

        Only scales that the next pass is fed with, or asked to predict. With --rollout cfg the unconditional class runs
        on the same inputs; that half needs no gradient, and no scale past the last one that is sampled.
        """
        sar, last = self.config.sar, len(schedule) - 1
        scales = last if first or sar.csf_target in FEEDING else last + 1  # the last scale feeds nothing
        part, before = ScaleSchedule(schedule.sides[:scales]), schedule.offsets[first]
        start = schedule.offsets[self.pathway.feeds(last)] if sar.ssr == "last" else before
        shape = (len(labels), schedule.total - before)
        draw = rollout_sampling(sar)
        sampler = self.model.head.sampler(draw, start - before, part.total - before, shape, labels.device)
        if sar.csf_target == "teacher_soft" and first == 0:
            sampler = replace(sampler, keep_logits=True)
        guidance = self.model.guidance_weights(draw, schedule.sides)[first:scales]
        if not any(guidance):
            return sampler
        null = torch.full_like(labels, self.model.null_class)
        with torch.no_grad(), self.precision.autocast(cache=False):
            features = self.model(null, inputs, part, first=first, features=True)
        weights = [[w] for w, n in zip(guidance, part.lengths[first:], strict=True) for _ in range(n)]  # (n, 1)
        return sampler.guided(features, torch.tensor(weights).to(labels.device, non_blocking=True))

    def measured(self, teacher: Prediction, student: Prediction, schedule: ScaleSchedule) -> Metrics:
        """Numbers to log of both passes."""
        last = self.config.sar.ssr == "last"
        asked = ScaleSchedule((1, schedule.sides[-1])) if last else schedule
        return {
            **teacher.metrics(schedule),
            **{f"student_{name}": value for name, value in student.metrics(asked, first=1).items()},
            "loss_tf": teacher.loss.detach(),
            "loss_csf": student.loss.detach(),
            **{f"rollout_{name}": value for name, value in teacher.shares().items()},
        }


def rollout_sampling(sar: SARConfig) -> SamplingConfig:
    """Sampling of tokens in training, by --rollout: argmax is greedy, of a flow-matching head one step to the mean."""
    if sar.rollout == "argmax":
        return SamplingConfig(Guidance("none"), top_k=1, flow_steps=1)
    guidance = Guidance("half_ramp", sar.sf_cfg_scale) if sar.rollout == "cfg" else Guidance("none")
    return SamplingConfig(guidance, sar.sf_top_k, sar.sf_top_p, flow_steps=sar.rollout_steps)
