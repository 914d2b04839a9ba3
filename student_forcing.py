"""The paper's naive student forcing (Sec. 4.1, Table 3): inputs from the model's own autoregressive rollout.

Legend: B batch, L tokens of a schedule.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from models.sampling import evaluating, generate_scales
from models.scales import ScaleSchedule
from sar_trainer import rollout_sampling
from trainer import Metrics, Trainer
from utils.data.datasets import CodeBatch


class StudentForcing(Trainer):
    """Mean cross-entropy on ground truth, with some scales' inputs self-generated (paper Eq. 3).

    The paper's loss is that of the autoregressive pass itself. Here the rollout runs first, cached and without
    gradient, and one parallel forward on the same inputs is trained. As a token sees its own and coarser scales only,
    and inputs are discrete codes through which no gradient flows, both give the same logits, loss and gradient.
    """

    @abstractmethod
    def self_fed(self, schedule: ScaleSchedule) -> list[bool]:
        """For every scale, whether its input is self-generated. The first has none.

        On a residual pathway what a self-fed scale put on the canvas stays there for those after it.
        """

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        truth = batch.tokens(schedule)
        fed = self.roll_out(batch, schedule)
        found = self.predict(batch.labels, self.inputs(fed, schedule), truth, schedule)
        return found.loss, {"loss": found.loss.detach(), **found.metrics(schedule)}

    @torch.no_grad()
    def roll_out(self, batch: CodeBatch, schedule: ScaleSchedule) -> Tensor:
        """Ground-truth tokens (B, L), but for scales whose successor is self-fed: those hold what the model drew."""
        sar, truth = self.config.sar, batch.tokens(schedule)
        feeds_next = [*self.self_fed(schedule)[1:], False]
        if not any(feeds_next):
            return truth
        last = max(i for i, feeds in enumerate(feeds_next) if feeds)
        mine = dict(zip(schedule.sides, feeds_next, strict=True))
        uniforms = torch.rand(truth.shape, device=truth.device)
        parts = list(schedule.split(truth))
        draw = rollout_sampling(sar)
        with evaluating(self.model), self.precision.autocast(cache=False):
            scales = generate_scales(
                self.model, self.pathway, batch.labels, schedule, draw, uniforms,
                edit=lambda s, codes: codes if mine[s] else batch.codes[s],
            )  # fmt: skip
            for i in range(last + 1):  # finer scales feed nothing: they are not drawn
                parts[i] = next(scales)[1]
        return torch.cat(parts, dim=1)


class FullStudentForcing(StudentForcing):
    """Every input is self-generated."""

    def self_fed(self, schedule: ScaleSchedule) -> list[bool]:
        return [False] + [True] * (len(schedule) - 1)


class AlternateStudentForcing(FullStudentForcing):
    """Teacher-forced and student-forced steps take turns, 1:1."""

    def self_fed(self, schedule: ScaleSchedule) -> list[bool]:
        return super().self_fed(schedule) if self.step % 2 else [False] * len(schedule)


class InterleavedStudentForcing(StudentForcing):
    """Scales of odd number (1, 3, …) are teacher-forced, those of even number self-fed."""

    def self_fed(self, schedule: ScaleSchedule) -> list[bool]:
        return [number % 2 == 0 for number in range(1, len(schedule) + 1)]


class HybridStudentForcing(StudentForcing):
    """Table 3's hybrid@k: teacher forcing before side k, self-generated inputs from side k on.

    With the default scales @8 leaves four self-fed scales (8, 10, 13, 16) and @16 one. A drawn schedule without a side
    of at least k is teacher-forced.
    """

    def self_fed(self, schedule: ScaleSchedule) -> list[bool]:
        return [i > 0 and s >= self.config.sar.sf_hybrid_from for i, s in enumerate(schedule.sides)]


STUDENT_FORCING = {
    "sf_full": FullStudentForcing,
    "sf_alternate": AlternateStudentForcing,
    "sf_interleave": InterleavedStudentForcing,
    "sf_hybrid": HybridStudentForcing,
}
