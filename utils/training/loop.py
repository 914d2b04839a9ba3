"""The loop of every training run: steps, logging, saving, resuming, stopping."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.sampling import evaluating
from utils.config.training import OF_A_NODE, changes
from utils.data.datasets import Examples, StepSampler, batches_of, linspace_indices, make_loader
from utils.reporting.pictures import save_picture
from utils.runtime.distributed import Ranks, check_launch, ranks
from utils.runtime.files import as_json, remove_stale, write_json
from utils.runtime.numerics import derive_seed
from utils.runtime.process import StopRequest, locked
from utils.runtime.provenance import record_start
from utils.training.log import METRICS, Progress, Silent, check_tracking, make_logger, read_metrics
from utils.training.optim import apply_gradients, clip_gradients, set_rates
from utils.training.state import Config, Metrics, TrainingState


def start(config: Config, build: Callable[[Any, Ranks], Loop], check: Callable[[Any], None]) -> None:
    """A training run from its config to its end, alone or as one of torchrun's ranks; with --check, only the check.

    SIGTERM, SIGUSR1 and Ctrl-C save, and end with 128 + the signal; a second Ctrl-C ends at once.
    """
    check_tracking(config.log)
    check_launch()
    if config.run.check:
        return check(config)
    with (
        ranks(timedelta(minutes=config.run.timeout_minutes)) as me,
        StopRequest().listening() as stop,
        locked(config.run.directory, me.first),
    ):
        build(config, me).fit(stop)


class Loop(TrainingState, ABC):
    """Shared by every training run: one step, the order of its data, and when to log, judge, draw, save and stop.

    All randomness of a step is a function of (seed, step, micro-batch index), so that a resumed run, or one on
    another number of ranks with the same micro-batch, trains identically.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        train_set: Examples,
        val_set: Examples | None,
        ranks: Ranks,
        forward: nn.Module | None = None,
        auxiliary: dict[str, nn.Module] | None = None,
    ):
        """See `TrainingState` for `forward` and `auxiliary`."""
        optim = config.optim
        self.epoch_steps = len(train_set) / optim.bs
        total_steps = optim.steps or max(1, math.ceil(optim.ep * self.epoch_steps))
        super().__init__(config, model, ranks, total_steps, forward, auxiliary)
        self.train_set, self.val_set = train_set, val_set
        self.stop_step = min(total_steps, optim.max_steps or total_steps)
        held_out = min(config.watch.eval_images, len(val_set) if val_set is not None else 0)
        if self.sharded:
            held_out -= held_out % ranks.world  # equally many batches on every rank
        self.validation_images = held_out if held_out >= ranks.world else 0  # every rank must have its share
        if config.watch.eval_every and held_out and not self.validation_images:
            raise ValueError(f"--eval_every has no effect: {held_out} held-out images for {ranks.world} ranks")
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------------------------- what a run defines

    @abstractmethod
    def micro_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Loss of one micro-batch and what to log of it: images (B, 3, H, W) of bytes, or whatever else the data set
        yields, and class ids (B,)."""

    def on_step_end(self, skip: Tensor) -> None:
        """Hook at the end of a step. `skip` is 1.0 where a loss or gradient was not finite, so that no
        weight changed (in fp16, where gradients may overflow: where a loss was not)."""

    @abstractmethod
    def validation_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """Validation metrics of one batch, "loss" among it, each a mean over its images; what is no single number
        is for `conclude`."""

    def conclude(self, means: Metrics) -> Metrics:
        """Means over all held-out images → the numbers to report."""
        return means

    @abstractmethod
    def picture(self) -> Tensor:
        """Picture of where the run stands (3, H, W) in [0, 1]."""

    @abstractmethod
    def describe(self) -> str:
        """A line on what is being trained."""

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self, stop: StopRequest | None = None) -> None:
        """Train to the end from where `resume` left off, or until `stop` has a signal.

        Raises BadImage, FloatingPointError, SaveError; SystemExit when it was asked to stop.
        """
        if self.ranks.world > 1:
            self.check_ranks()
        progress = Progress(self.config.run.name, self.stop_step, self.step, self.ranks)
        owed = self.owed_reports()
        if self.step >= self.stop_step and not any(owed):
            return progress.say(f"finished at step {self.step}: nothing to do in {self.directory}")
        self.record()
        log = make_logger(self.config, self.ranks, self.step)
        progress.say(self.describe())
        progress.say(self.describe_batch())
        signal = 0.0
        try:
            self.report(owed, log, progress)
            with batches_of(self.loader()) as batches:
                while self.step < self.stop_step and not signal:
                    self.train_step(batches)
                    progress.advance(self.config.optim.bs)
                    self.guard.raise_if_nonfinite(self.keys, progress.say, latest=self.precision.name == "fp16")
                    if self.due(self.config.log.log_every):
                        self.log_step(log, progress)
                    signal, late = self.ranks.all_reduce_max([stop.signal if stop else 0, self.overdue()])
                    if signal or late or self.save_due():
                        self.guard.raise_if_nonfinite(self.keys, progress.say)
                        self.save()  # first: a failure of what follows costs nothing
                    self.report(self.due_reports(), log, progress)
                    self.checkpoints.check()
            self.checkpoints.finish()
            self.ranks.barrier()  # until the first rank has written the last checkpoint
        finally:
            self.checkpoints.close()
            progress.close()
            log.close()
        if self.step < self.stop_step:
            progress.say(f"stopped by signal {int(signal)}, saved step {self.step}: the same command goes on")
            raise SystemExit(128 + int(signal))
        return None

    def train_step(self, batches: Iterator) -> None:
        """One optimiser step over the micro-batches of this rank."""
        optim, total = self.config.optim, torch.zeros((), device=self.ranks.device)
        for i in range(self.accumulate):
            images, labels = (x.to(self.ranks.device, non_blocking=True) for x in next(batches))
            micro_batch = i * self.ranks.world + self.ranks.rank
            torch.manual_seed(derive_seed("step", self.config.run.seed, self.step, micro_batch))
            with self.no_gradient_sync(i + 1 < self.accumulate):
                loss, metrics = self.micro_loss(images, labels)
                self.precision.scaler.scale(loss / self.accumulate).backward()
            self.meter.add(metrics)
            total += loss.detach()
        set_rates(self.optimizer, self.step, self.total_steps, optim)
        self.precision.scaler.unscale_(self.optimizer)
        norms = {"gradient_norm": clip_gradients(self.model, optim.tclip)}
        for name, module in self.auxiliary.items():
            if any(p.grad is not None for p in module.parameters()):
                norms[f"gradient_norm_{name}"] = clip_gradients(module, optim.tclip)
        norm = torch.stack(list(norms.values())).sum()
        skip = self.guard.check(self.step, total, norm, norm_counts=self.precision.name != "fp16")
        apply_gradients(self.optimizer, self.precision, skip)
        for average in self.averages.values():
            average.update(self.model)
        self.meter.add(norms, weight=self.accumulate)
        self.on_step_end(skip)
        self.step += 1

    def no_gradient_sync(self, stay: bool) -> AbstractContextManager:
        """DDP and FSDP average the gradients over the ranks with the last micro-batch only."""
        stack = ExitStack()
        for network in self.networks:
            if hasattr(network, "set_requires_gradient_sync"):
                network.set_requires_gradient_sync(not stay)  # type: ignore[operator]
            elif stay and hasattr(network, "no_sync"):
                stack.enter_context(network.no_sync())  # type: ignore[operator]
        return stack

    def log_step(self, log: Silent, progress: Progress) -> None:
        """Log the means since the last log line."""
        self.guard.raise_if_nonfinite(self.keys, progress.say)
        values = self.meter.means(self.ranks)
        values["images_per_second"] = progress.rate()
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        log.scalars({f"train/{name}": value for name, value in values.items()}, self.step)
        progress.show({name: values[name] for name in ("loss", "images_per_second", "lr")})

    def due_reports(self) -> tuple[bool, bool]:
        """Flags: the step just done ends with a held-out loss, and with a picture."""
        watch = self.config.watch
        return (
            self.due(watch.eval_every) and self.validation_images > 0,
            self.due(watch.vis_every) and watch.vis_num_samples > 0,
        )

    def owed_reports(self) -> tuple[bool, bool]:
        """`due_reports` of the step that the run goes on from, which may have died between its save and them."""
        loss, picture = self.due_reports() if self.step and self.ranks.first else (False, False)
        judged = read_metrics(self.directory, "val/loss")[0] if (self.directory / METRICS).is_file() else []
        loss = loss and self.step not in judged
        owed = self.ranks.all_reduce_max([loss, picture and not self.picture_path.is_file()])
        return bool(owed[0]), bool(owed[1])

    @property
    def picture_path(self) -> Path:
        return self.directory / f"samples/step_{self.step:07d}.png"

    def report(self, wanted: tuple[bool, bool], log: Silent, progress: Progress) -> None:
        """The held-out loss and the picture of this step, as `wanted`."""
        loss, picture = wanted
        if loss:
            values = self.validate()
            log.scalars({f"val/{name}": value for name, value in values.items()}, self.step)
            progress.say(f"step {self.step}: held-out loss {values['loss']:.4f}")
        if picture and (self.ranks.first or self.sharded):
            drawn = self.picture()
            if self.ranks.first:
                save_picture(drawn, self.picture_path)
                log.image("samples", drawn, self.step)

    def keys(self, step: int, rank: int) -> list[tuple[int, int]]:
        """Epoch and index of the images of a rank's step."""
        return [key for batch in self.sampler(step, step + 1, rank) for key in batch]

    def sampler(self, first: int, end: int, rank: int) -> StepSampler:
        """The micro-batches of a rank from step `first` to before step `end`."""
        bs, seed = self.config.optim.bs, self.config.run.seed
        return StepSampler(len(self.train_set), seed, bs, self.micro_batch, rank, self.ranks.world, first, end)

    def loader(self) -> DataLoader:
        """The micro-batches of this rank from the current step to the last."""
        sampler = self.sampler(self.step, self.stop_step, self.ranks.rank)
        return make_loader(self.train_set, sampler, self.config.data.workers, self.ranks.device)

    def due(self, every: float) -> bool:
        """True when the step just done ends a stretch of `every` steps, or the run (0: only that)."""
        return self.step == self.stop_step or self.ends(every)

    def ends(self, every: float) -> bool:
        """True when the step just done ends a stretch of `every` steps."""
        return every > 0 and int(self.step / every) > int((self.step - 1) / every)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """`validation_losses` over `eval_images` held-out images, evenly over the split, shared out among the ranks."""
        n = self.validation_images
        mine = linspace_indices(n, len(self.val_set))[self.ranks.rank :: self.ranks.world]
        keys = [[(0, i) for i in mine[a : a + self.micro_batch]] for a in range(0, len(mine), self.micro_batch)]
        sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.ranks.device))
        with evaluating(self.model):
            for names, batch in zip(keys, make_loader(self.val_set, keys, 0, self.ranks.device), strict=True):
                images, labels = (x.to(self.ranks.device) for x in batch)
                torch.manual_seed(derive_seed("validation", self.config.run.seed, names[0][1]))
                for name, value in self.validation_losses(images, labels).items():
                    sums[name] = sums[name] + value * len(labels)
        totals = self.ranks.sum(torch.cat([sums[name].flatten() for name in sorted(sums)])) / n
        parts = totals.split([sums[name].numel() for name in sorted(sums)])
        means = {name: part.view_as(sums[name]) for name, part in zip(sorted(sums), parts, strict=True)}
        found = self.conclude(means)
        return dict(zip(found, torch.stack([value.float() for value in found.values()]).tolist(), strict=True))

    def describe_batch(self) -> str:
        bs, world = self.config.optim.bs, self.ranks.world
        return (
            f"{self.precision.name} on {world} × {self.ranks.device.type}; {len(self.train_set)} images, "
            f"{bs} a step = {self.micro_batch} × {world} ranks × {self.accumulate}; "
            f"steps {self.step} to {self.stop_step} of {self.total_steps}, writing to {self.directory}"
        )

    # ---------------------------------------------------------------------------------- saving, resuming

    def invariants(self) -> dict[str, object]:
        """See `TrainingState.invariants`."""
        names = hashlib.sha256("\n".join(self.train_set.classes).encode()).hexdigest()
        return {"images": len(self.train_set), "class_names_sha256": names, **self.train_set.record}

    def check_ranks(self) -> None:
        """Raises ValueError where ranks have other data or flags, as nodes may that each have their own."""
        held_out = len(self.val_set) if self.val_set is not None else 0
        mine = {**asdict(self.config), "invariants": {**self.invariants(), "held_out": held_out}}
        first, *others = self.ranks.all_gather_object(as_json(mine))
        for rank, other in enumerate(others, start=1):
            found = {name: line for name, line in changes(first, other).items() if name not in OF_A_NODE}
            if found:
                raise ValueError(f"rank {rank} differs from rank 0: {'; '.join(found.values())}")

    def config_record(self) -> dict[str, object]:
        """Content of DIRECTORY/config.json."""
        return asdict(self.config)

    def record(self) -> None:
        """Write the resolved config, and how the run was started."""
        if self.ranks.first:
            remove_stale(self.directory)
            write_json(self.directory / "config.json", self.config_record())
            record_start(self.directory, self.ranks, self.step)

    def overdue(self) -> float:
        """1.0 when the last checkpoint is older than --save_every_minutes. Each rank has its own clock."""
        minutes = self.config.run.save_every_minutes
        return float(0 < minutes * 60 <= time.monotonic() - self.saved_at)

    def save_due(self) -> bool:
        return self.due(self.config.run.save_every_steps or self.epoch_steps) or self.keep_due()

    def keep_due(self) -> bool:
        """True when the checkpoint of this step stays for good (--keep_every_epochs)."""
        return self.ends(self.config.run.keep_every_epochs * self.epoch_steps)

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        self.saved_at = time.monotonic()
        if self.step != self.saved_step:
            self.checkpoint(self.keep_due())
