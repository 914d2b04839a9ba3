"""Self-Autoregressive Refinement: Stagger-Scale Rollout and the Contrastive Student-Forcing Loss (Algorithm 1).

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.sampling import Guidance, guide, sample_tokens
from models.scales import ScaleSchedule, shift_all
from trainer import Metrics, TeacherPass, Trainer, scale_losses
from utils.data import CodeBatch


class SARTrainer(Trainer):
    """L = L_TF + γ·L_CSF (paper Eq. 11).

    1. Teacher forcing (Eq. 4): ground truth, shifted up, through the network.
    2. Stagger-scale rollout (Eq. 5–8): tokens drawn from the teacher's logits, shifted up one scale exactly as
       ground truth is, feed one second pass.
    3. Contrastive student forcing (Eq. 9–10): the second pass predicts, at scales 2…N, the tokens that the teacher
       drew there.
    """

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        gamma = self.config.sar.csf_weight
        teacher = self.teacher_pass(batch, schedule)
        if gamma == 0 or len(schedule) < 2:
            return teacher.loss, teacher.metrics
        rollout = self.roll_out(teacher, batch.labels, schedule)  # (B, L)
        csf_loss, metrics = self.student_loss(rollout, teacher.tokens, batch.labels, schedule)
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

    @torch.no_grad()
    def roll_out(self, teacher: TeacherPass, labels: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Tokens drawn from the teacher's logits at every scale (B, L), without gradient."""
        sar = self.config.sar
        logits = teacher.logits.detach()
        if sar.rollout == "argmax":
            return logits.argmax(-1)
        guidance = Guidance("half_ramp", sar.sf_cfg_scale)
        if sar.rollout == "cfg" and any(guidance.weights(schedule.sides)):
            # Only the unconditional half is new; it needs no gradient and no copy of the conditional one.
            null = torch.full_like(labels, self.model.null_class)
            unconditional = self.model(null, teacher.inputs, schedule)
            halves = zip(schedule.split(logits), schedule.split(unconditional), strict=True)
            weights = guidance.weights(schedule.sides)
            logits = torch.cat([guide(c, u, w) for (c, u), w in zip(halves, weights, strict=True)], dim=1)
        uniforms = torch.rand(logits.shape[:-1], device=logits.device)
        return sample_tokens(logits, sar.sf_top_k, sar.sf_top_p, uniforms)

    def student_loss(
        self, rollout: Tensor, truth: Tensor, labels: Tensor, schedule: ScaleSchedule
    ) -> tuple[Tensor, Metrics]:
        """The second pass on the rollout shifted up, and its cross-entropy at the scales it was fed.

        --ssr all (paper): every scale from its predecessor's rollout, in one pass of the whole schedule.
        --ssr last (released code): only the last transition, as the two-scale sequence [1, s_N] whose first token
        is the class embedding without pos_start.
        """
        targets = rollout if self.config.sar.csf_target == "teacher" else truth
        if self.config.sar.ssr == "all":
            logits = self.network(labels, shift_all(rollout, self.codebook, schedule), schedule)
            fed = slice(schedule.lengths[0], None)  # scales 2…N
            scales = ScaleSchedule(schedule.sides[1:])
        else:
            pair = ScaleSchedule(schedule.sides[-2:])
            drawn = rollout[:, -pair.total :]  # the last two scales
            short = ScaleSchedule((1, schedule.sides[-1]))
            logits = self.network(labels, shift_all(drawn, self.codebook, pair), short, start=False)
            fed = slice(1, None)
            scales = ScaleSchedule(schedule.sides[-1:])
        loss, metrics = scale_losses(logits[:, fed], targets[:, -scales.total :], scales)
        return loss, {f"student_{name}": value for name, value in metrics.items()}
