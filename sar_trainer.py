"""Self-Autoregressive Refinement: Stagger-Scale Rollout and the Contrastive Student-Forcing Loss (Algorithm 1).

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width, C width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from models.flexvar import Task
from models.head import Linear
from models.sampling import Guidance, guide, sample_tokens
from models.scales import ScaleSchedule, shift_all, shift_up
from trainer import Metrics, Trainer
from utils.config import SARConfig
from utils.data import CodeBatch


def rollout_guidance(sar: SARConfig) -> Guidance:
    """The guidance of tokens drawn in training."""
    return Guidance("half_ramp", sar.sf_cfg_scale) if sar.rollout == "cfg" else Guidance("none")


class Rollout:
    """Tokens drawn from a pass's logits while the head is read (Eq. 5), at the span first…end of the L it is asked.

    `tokens` (B, L) is -1 where nothing was drawn. `logits` are what they were drawn from, if asked for.
    """

    def __init__(self, sar: SARConfig, tokens: Tensor, first: int, end: int, keep_logits: bool = False):
        """`tokens` are the true ones."""
        self.sar, self.first, self.end = sar, first, end
        self.tokens, self.agreement = torch.full_like(tokens, -1), torch.zeros_like(tokens, dtype=torch.bool)
        self.uniforms = torch.rand(tokens.shape, device=tokens.device) if sar.rollout != "argmax" else None
        self.kept: list[Tensor] | None = [] if keep_logits else None
        self.unconditional: Tensor | None = None  # (B, end, C) features
        self.weights: Tensor | None = None  # (end, 1) guidance of each token

    def guide(self, unconditional: Tensor, lengths: Sequence[int], weights: list[float]) -> None:
        """Draw from logits that features (B, end, C) of the unconditional class guide, with a weight a scale."""
        each = torch.tensor(weights).repeat_interleave(torch.tensor(lengths)).unsqueeze(-1)
        self.unconditional, self.weights = unconditional, each.to(unconditional.device, non_blocking=True)

    @torch.no_grad()
    def look(self, start: int, end: int, logits: Tensor, head: Linear) -> None:
        """Draw the tokens start…end, as far as they lie in the span, from their logits (B, end - start, V)."""
        a, b = max(start, self.first), min(end, self.end)
        if a >= b:
            return
        logits = logits[:, a - start : b - start]
        best = logits.argmax(-1)
        if self.unconditional is not None:
            logits = guide(logits, head(self.unconditional[:, a:b]), self.weights[a:b])
        if self.sar.rollout == "argmax":
            drawn = best
        else:
            drawn = sample_tokens(logits, self.sar.sf_top_k, self.sar.sf_top_p, self.uniforms[:, a:b])
        self.tokens[:, a:b], self.agreement[:, a:b] = drawn, drawn == best
        if self.kept is not None:
            self.kept.append(logits)

    @property
    def logits(self) -> Tensor:
        """(B, end - first, V)."""
        return torch.cat(self.kept, dim=1)

    def metrics(self, truth: Tensor) -> Metrics:
        """How many of the drawn tokens are the likeliest, and how many the true ones (B, L)."""
        span = slice(self.first, self.end)
        hits = self.tokens[:, span] == truth[:, span]
        return {"rollout_agreement": self.agreement[:, span].float().mean(), "rollout_accuracy": hits.float().mean()}


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
        if gamma == 0 or len(schedule) < 2:
            return super().compute_loss(batch, schedule)
        tokens, labels = batch.tokens(schedule), batch.labels
        inputs, task = shift_all(tokens, self.codebook, schedule), self.task(tokens, schedule)
        rollout = self.plan(tokens, inputs, labels, schedule, task)
        tf_loss, metrics = self.token_loss(labels, inputs, schedule, tokens, look=rollout.look, task=task)
        csf_loss, student = self.student_loss(rollout, tokens, labels, schedule, task)
        loss = tf_loss + gamma * csf_loss
        return loss, {
            **metrics,
            **{f"student_{name}": value for name, value in student.items()},
            "loss": loss.detach(),
            "loss_tf": tf_loss.detach(),
            "loss_csf": csf_loss.detach(),
            **rollout.metrics(task.pick(tokens)),
        }

    def gamma(self) -> float:
        """γ at this step: --csf_weight, reached linearly over the first --csf_ramp of the run."""
        sar = self.config.sar
        ramp = sar.csf_ramp * self.total_steps
        return sar.csf_weight * min(1.0, self.step / ramp) if ramp else sar.csf_weight

    def transition(self, schedule: ScaleSchedule) -> int:
        """The scale whose transition --ssr last or random trains."""
        if self.config.sar.ssr == "last":
            return len(schedule) - 1
        return random.Random(f"ssr/{self.config.run.seed}/{self.step}").randrange(1, len(schedule))

    def plan(self, tokens: Tensor, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule, task: Task) -> Rollout:
        """The rollout to be drawn from the teacher's logits: only the scales that the second pass reads or is asked."""
        sar, starts = self.config.sar, (0, *accumulate(task.lengths))
        last = len(schedule) - 1 if sar.ssr == "all" else self.transition(schedule)
        first = 0 if sar.ssr == "all" else last - 1
        scales = last if sar.csf_target == "ground_truth" else last + 1  # scale `last` is drawn as a target only
        part = ScaleSchedule(schedule.sides[:scales])
        soft = sar.csf_target == "teacher_soft"
        rollout = Rollout(sar, task.pick(tokens), starts[first], starts[scales], soft)
        self.guide(rollout, labels, inputs[:, : part.total - part.lengths[0]], part, task.cut(scales), schedule)
        return rollout

    @torch.no_grad()
    def guide(
        self,
        rollout: Rollout,
        labels: Tensor,
        inputs: Tensor,
        part: ScaleSchedule,
        task: Task,
        schedule: ScaleSchedule,
        first: int = 0,
    ) -> None:
        """With --rollout cfg, give a rollout the unconditional class's features on the same inputs.

        Only that half is new. It needs no gradient, and no scale past `part`, the scales of `schedule` up to the last
        one that is drawn. `task` is what of them is asked, from scale number `first` on.
        """
        weights = rollout_guidance(self.config.sar).weights(schedule.sides)[first : len(part)]
        if not any(weights):
            return
        null = torch.full_like(labels, self.model.null_class)
        with self.precision.autocast(cache=False):
            features = self.model(null, inputs, part, read=lambda x, head: x, first=first, **task.arguments)
        rollout.guide(task.pick(features), task.lengths, weights)

    def student_loss(
        self, rollout: Rollout, truth: Tensor, labels: Tensor, schedule: ScaleSchedule, task: Task
    ) -> tuple[Tensor, Metrics]:
        """The second pass on the rollout shifted up, and its loss at the scales that it fed.

        --ssr all (paper): every scale from its predecessor's rollout, in one pass of the whole schedule.
        --ssr last (released code): only the last transition, as the two-scale sequence [1, s_N] whose first token
        is the class embedding without pos_start. --ssr random: the same of a transition drawn anew each step.
        --ssr_steps n (with all): n such passes, each on the tokens drawn from the one before; the mean of their losses.
        """
        sar, fed = self.config.sar, task.put(rollout.tokens, truth)  # (B, L)
        if sar.ssr != "all":
            i = self.transition(schedule)
            side, before = schedule.sides[i], schedule.sides[i - 1]
            inputs = shift_up(fed[:, schedule.span(i - 1)], self.codebook, before, side)
            targets = self.targets(rollout, fed, truth, schedule.span(i))
            return self.token_loss(labels, inputs, ScaleSchedule((1, side)), targets, first=1, start=False)
        one, fed_end = schedule.lengths[0], schedule.offsets[-2]  # the last scale feeds nothing
        # The first scale feeds, but has no loss: nothing but the class predicts it.
        targets = self.targets(rollout, fed, truth, slice(one, schedule.total))
        part, results = ScaleSchedule(schedule.sides[:-1]), []
        for more in reversed(range(sar.ssr_steps)):
            inputs, look = shift_all(fed, self.codebook, schedule), None
            if more and len(part) > 1:
                again, task = Rollout(sar, truth[:, one:], 0, fed_end - one), Task(part.lengths[1:])
                self.guide(again, labels, inputs[:, : fed_end - one], part, task, schedule, first=1)
                look = again.look
            results.append(self.token_loss(labels, inputs, schedule, targets, first=1, look=look))
            if look:
                fed = torch.cat([fed[:, :one], again.tokens[:, : fed_end - one], fed[:, fed_end:]], dim=1)
        return torch.stack([loss for loss, _ in results]).mean(), results[0][1]

    def targets(self, rollout: Rollout, fed: Tensor, truth: Tensor, span: slice) -> Tensor:
        """What the second pass should predict at a span of tokens (--csf_target)."""
        target = self.config.sar.csf_target
        if target == "teacher_soft":
            # Where the first scale was asked in part only, later tokens come so much earlier.
            before = rollout.first + truth.shape[1] - rollout.tokens.shape[1]
            return rollout.logits[:, span.start - before : span.stop - before]  # (B, n, V)
        return (fed if target == "teacher" else truth)[:, span]
