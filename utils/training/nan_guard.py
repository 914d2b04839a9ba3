"""Losses and gradients that are not finite: kept out of the weights at once, known to the host a step later."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.weights import some
from utils.runtime.distributed import Ranks

Keys = Callable[[int, int], Sequence[tuple[int, int]]]  # step, rank → epoch and index of the images it saw


class FiniteGuard:
    """Decides on the device whether a step may change the weights, so that nothing waits for it.

    `limit` steps may be dropped. With 0 the first one ends the run: no later step changes a weight either.
    """

    def __init__(self, ranks: Ranks, limit: int = 0):
        self.ranks, self.limit, self.skipped = ranks, limit, 0
        self.halted = torch.zeros((), dtype=torch.bool, device=ranks.device)
        self.waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def check(self, step: int, loss: Tensor, norm: Tensor, norm_counts: bool = True) -> Tensor:
        """1.0 where the update must be skipped, on the device and equal on every rank.

        loss: of this rank. norm: of the gradient, over all ranks; without `norm_counts` it may be anything. That is for
        fp16, whose gradients may overflow: its scaler drops those steps, and decides in place of this.
        """
        flags = torch.zeros(self.ranks.world + 1, device=self.ranks.device)
        flags[self.ranks.rank] = ~loss.isfinite()
        if norm_counts and self.ranks.first:
            flags[-1] = ~norm.isfinite()
        flags = self.ranks.sum(flags)
        bad = flags.any()
        if not self.limit:
            self.halted |= bad
            bad = self.halted
        event = None
        if flags.is_cuda:
            flags, event = flags.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.waiting.append((step, flags, event))
        return bad.float()

    def raise_if_nonfinite(self, keys: Keys, say: Callable[[str], None], latest: bool = True) -> None:
        """Count the steps that were dropped since the last call, and say what was in them; stop at one too many.

        Without `latest`, a GPU is not asked about the last step, which it may still be at.

        Raises FloatingPointError on the first rank and SystemExit on the others, which have the same to say.
        """
        last = len(self.waiting) - (not latest and self.ranks.device.type == "cuda")
        ready, self.waiting = self.waiting[:last], self.waiting[last:]
        for step, flags, event in ready:
            if event is not None:
                event.synchronize()
            *losses, gradient = flags.tolist()
            guilty = [rank for rank, bad in enumerate(losses) if bad]
            if not guilty and not gradient:
                continue
            self.skipped += 1
            what = f"the loss of rank {some(list(map(str, guilty)))}" if guilty else "the gradient"
            images = [
                f"{index} of epoch {epoch}"
                for rank in guilty or range(len(losses))
                for epoch, index in keys(step, rank)
            ]
            line = f"{what} is not finite at step {step}, images {some(images, 8)}"
            if self.skipped <= self.limit:
                say(f"{line}; dropped the step, number {self.skipped} of at most {self.limit}")
            elif self.ranks.first:
                raise FloatingPointError(f"{line}; it changed no weight")
            else:
                raise SystemExit(1)
