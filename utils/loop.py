"""The loop of every training run: steps, logging, saving, resuming, stopping."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.sampling import evaluating
from utils.checkpoint import EMA, MODEL, Checkpoints, RunState, SaveError, read_checkpoint, read_manifest
from utils.config import FIXED, TokenizerTrainConfig, TrainConfig, changes
from utils.data import StepSampler, Views, accumulation, make_loader
from utils.distributed import Ranks, data_parallel, gathered, ranks
from utils.files import as_json, write_json
from utils.finite import FiniteGuard
from utils.images import BadImage
from utils.log import Meter, Progress, make_logger, record_start
from utils.optim import (
    MovingAverage,
    Precision,
    apply_gradients,
    clip_gradients,
    derive_seed,
    learning_rate,
    make_optimizer,
    restore_optimizer,
)
from utils.pictures import save_picture
from utils.process import StopRequest, locked
from utils.weights import load_strictly

Config = TrainConfig | TokenizerTrainConfig
Metrics = dict[str, Tensor]


def start(config: Config, build: Callable[[Config, Ranks], Loop]) -> None:
    """A training run from its config to its end, alone or as one of torchrun's ranks.

    What a user can mend is one line on stderr and status 1. SIGTERM and SIGUSR1 save, and end with 128 + the signal.
    """
    with (
        ranks(timedelta(minutes=config.run.timeout_minutes)) as me,
        StopRequest().listening() as stop,
        ExitStack() as stack,
    ):
        with me.user_errors():
            stack.enter_context(locked(config.run.directory, me.first))
            loop = build(config, me)
        with me.user_errors(BadImage, FloatingPointError, SaveError, OSError):
            loop.fit(stop)


class Loop(ABC):
    """What every training run shares: the loop, one optimiser step, saving and resuming.

    All randomness of a step is a function of (seed, step, micro-batch index), so that a resumed run, or one on
    another number of ranks with the same micro-batch, trains identically.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        train_set: Views,
        val_set: Views | None,
        ranks: Ranks,
        forward: nn.Module | None = None,
    ):
        """`model` is what is saved; `forward`, when given, wraps it as the module that training calls."""
        optim = config.optim
        self.config, self.ranks, self.directory = config, ranks, config.run.directory
        self.train_set, self.val_set = train_set, val_set
        self.model = model.to(ranks.device)
        self.ema = MovingAverage(self.model, optim.ema) if optim.ema else None
        self.network = (forward or model).to(ranks.device)
        if ranks.world > 1:
            self.spread()
        self.optimizer = make_optimizer(model, optim)
        self.precision = Precision(optim.precision, ranks.device)
        self.micro_batch = optim.micro_batch or optim.bs // ranks.world
        self.accumulate = accumulation(optim.bs, self.micro_batch, ranks.world)
        self.epoch_steps = len(train_set) / optim.bs
        self.total_steps = max(1, math.ceil(optim.ep * self.epoch_steps))
        self.stop_step = min(self.total_steps, optim.max_steps or self.total_steps)
        held_out = min(config.watch.eval_images, len(val_set) if val_set is not None else 0)
        if self.sharded:
            held_out -= held_out % ranks.world  # equally many batches on every rank
        self.held_out_images = held_out if held_out >= ranks.world else 0  # every rank must have its share
        self.checkpoints = Checkpoints(self.directory, config.run.keep)
        self.guard = FiniteGuard(ranks, config.run.max_skipped if config.run.on_nonfinite == "skip" else 0)
        self.meter = Meter()
        self.step = 0
        self.saved_step, self.saved_at = 0, time.monotonic()

    def spread(self) -> None:
        """Make the ranks train one model: DDP."""
        self.network = data_parallel(self.network)

    # ------------------------------------------------------------------------------- what a run defines

    @abstractmethod
    def micro_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Loss of one micro-batch and what to log of it: images (B, 3, H, W) in [-1, 1], or whatever else the data set
        yields, and class ids (B,)."""

    @abstractmethod
    def held_out_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """The numbers to report of one held-out batch, "loss" among them, each a mean over its images."""

    @abstractmethod
    def picture(self) -> Tensor:
        """Where the run stands, at a glance (3, H, W) in [0, 1]."""

    @abstractmethod
    def describe(self) -> str:
        """What is being trained, in a line."""

    # ------------------------------------------------------------------------------------------ the loop

    def fit(self, stop: StopRequest | None = None) -> None:
        """Train to the end from where `resume` left off, or until `stop` has a signal.

        Raises BadImage, FloatingPointError, SaveError; SystemExit when it was asked to stop.
        """
        watch = self.config.watch
        progress = Progress(self.config.run.exp_name, self.stop_step, self.step, self.ranks)
        if self.step >= self.stop_step:
            return progress.say(f"finished at step {self.step}: nothing to do in {self.directory}")
        self.record()
        log = make_logger(self.config, self.ranks, self.step)
        progress.say(self.describe())
        progress.say(self.describe_batch())
        batches, signal = iter(self.loader()), 0.0
        try:
            while self.step < self.stop_step and not signal:
                self.train_step(batches)
                progress.advance(self.config.optim.bs)
                self.guard.heed(self.keys, progress.say, latest=self.precision.name == "fp16")
                if self.due(self.config.log.log_every):
                    self.guard.heed(self.keys, progress.say)
                    values = self.meter.means(self.ranks)
                    values["images_per_second"] = progress.rate()
                    values["lr"] = self.optimizer.param_groups[0]["lr"]
                    log.scalars({f"train/{name}": value for name, value in values.items()}, self.step)
                    progress.show({name: values[name] for name in ("loss", "images_per_second", "lr")})
                if self.due(watch.eval_every) and self.held_out_images:
                    values = self.held_out()
                    log.scalars({f"val/{name}": value for name, value in values.items()}, self.step)
                    progress.say(f"step {self.step}: held-out loss {values['loss']:.4f}")
                if self.due(watch.vis_every) and watch.vis_num_samples and (self.ranks.first or self.sharded):
                    picture = self.picture()
                    if self.ranks.first:
                        save_picture(picture, self.directory / f"samples/step_{self.step:07d}.png")
                        log.image("samples", picture, self.step)
                signal, late = self.ranks.highest([stop.signal if stop else 0, self.overdue()])
                if signal or late or self.save_due():
                    self.guard.heed(self.keys, progress.say)
                    self.save()
                self.checkpoints.check()
            self.checkpoints.finish()
            self.ranks.wait()  # until the first rank has written the last checkpoint
        finally:
            del batches  # ends the loader's workers
            self.checkpoints.close()
            progress.close()
            log.close()
        if self.step < self.stop_step:
            progress.say(f"stopped by signal {int(signal)}, saved step {self.step}: the same command goes on")
            raise SystemExit(128 + int(signal))
        return None

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
        """Whether the step just done ends a stretch of `every` steps, or the run (0: only that)."""
        return self.step == self.stop_step or self.ends(every)

    def ends(self, every: float) -> bool:
        """Whether the step just done ends a stretch of `every` steps."""
        return every > 0 and int(self.step / every) > int((self.step - 1) / every)

    def train_step(self, batches: Iterator) -> None:
        """One optimiser step over the micro-batches of this rank."""
        optim, total = self.config.optim, torch.zeros((), device=self.ranks.device)
        for i in range(self.accumulate):
            images, labels = (x.to(self.ranks.device, non_blocking=True) for x in next(batches))
            micro_batch = i * self.ranks.world + self.ranks.rank
            torch.manual_seed(derive_seed("step", self.config.run.seed, self.step, micro_batch))
            with self.gradients_stay_here(i + 1 < self.accumulate):
                loss, metrics = self.micro_loss(images, labels)
                self.precision.scaler.scale(loss / self.accumulate).backward()
            self.meter.add(metrics)
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, optim)
        norm = clip_gradients(self.model, self.optimizer, self.precision, optim.tclip)
        skip = self.guard.judge(self.step, total, norm, norm_counts=self.precision.name != "fp16")
        apply_gradients(self.optimizer, self.precision, skip)
        if self.ema is not None:
            self.ema.update(self.model)
        self.meter.add({"gradient_norm": norm}, weight=self.accumulate)
        self.step += 1

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """`held_out_losses` over the first `eval_images` held-out images, shared out among the ranks."""
        n = self.held_out_images
        mine = range(self.ranks.rank, n, self.ranks.world)
        keys = [[(0, i) for i in mine[a : a + self.micro_batch]] for a in range(0, len(mine), self.micro_batch)]
        sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.ranks.device))
        with evaluating(self.model):
            for batch in make_loader(self.val_set, keys, 0, self.ranks.device):
                images, labels = (x.to(self.ranks.device) for x in batch)
                for name, value in self.held_out_losses(images, labels).items():
                    sums[name] += value * len(labels)
        names = sorted(sums)
        totals = self.ranks.sum(torch.stack([sums[name] for name in names])) / n
        return dict(zip(names, totals.tolist(), strict=True))

    def gradients_stay_here(self, stay: bool) -> AbstractContextManager:
        """DDP averages the gradients over the ranks with the last micro-batch only."""
        return self.network.no_sync() if stay and hasattr(self.network, "no_sync") else nullcontext()

    def describe_batch(self) -> str:
        bs, world = self.config.optim.bs, self.ranks.world
        return (
            f"{self.precision.name} on {world} × {self.ranks.device.type}; {len(self.train_set)} images, "
            f"{bs} a step = {self.micro_batch} × {world} ranks × {self.accumulate}; "
            f"steps {self.step} to {self.stop_step} of {self.total_steps}, writing to {self.directory}"
        )

    # ---------------------------------------------------------------------------------- saving, resuming

    def facts(self) -> dict[str, object]:
        """What, beside its flags, a run depends on and cannot change."""
        names = hashlib.sha256("\n".join(self.train_set.classes).encode()).hexdigest()
        return {"images": len(self.train_set), "class_names_sha256": names}

    def described(self) -> dict[str, object]:
        """What DIRECTORY/config.json says."""
        return asdict(self.config)

    def record(self) -> None:
        """Write the resolved config, and how the run was started."""
        if self.ranks.first:
            write_json(self.directory / "config.json", self.described())
            record_start(self.directory, self.ranks, self.step)

    def overdue(self) -> float:
        """1.0 when the last checkpoint is older than --save_every_minutes. Each rank has its own clock."""
        minutes = self.config.run.save_every_minutes
        return float(0 < minutes * 60 <= time.monotonic() - self.saved_at)

    def save_due(self) -> bool:
        return self.due(self.config.run.save_every_steps or self.epoch_steps) or self.keep_due()

    def keep_due(self) -> bool:
        """Whether the checkpoint of this step stays for good (--keep_every_epochs)."""
        return self.ends(self.config.run.keep_every_epochs * self.epoch_steps)

    def save(self) -> None:
        """Everything that `resume` needs, as it is now; the first rank writes it while training goes on."""
        self.saved_at = time.monotonic()
        if self.step == self.saved_step:
            return
        self.saved_step = self.step
        self.checkpoints.finish()  # before the copy: one at a time in memory
        models = {MODEL: self.model, **({EMA: self.averaged} if self.averaged is not None else {})}
        tensors = {name: model.state_dict() for name, model in models.items()}
        weights, optimizer = gathered((tensors, self.optimizer.state_dict()), keep=self.ranks.first)
        meters = self.ranks.everyones(self.meter.state())
        if self.ranks.first:
            scaler = self.precision.scaler.state_dict()
            state = RunState(self.step, optimizer, scaler, meters, self.guard.skipped)
            about = {"config": as_json(asdict(self.config)), "facts": self.facts(), "micro_batch": self.micro_batch}
            self.checkpoints.submit(state, weights, about, self.keep_due())

    def resume(self) -> None:
        """Go on from the newest valid checkpoint of this run's directory, if there is one."""
        newest = self.checkpoints.newest() if self.ranks.first else 0
        step = int(self.ranks.highest([newest])[0])
        if not step:
            return
        path = self.checkpoints.path(step)
        if not path.is_dir():
            raise ValueError(f"this rank sees no {path}: the run's directory must be one that all ranks share")
        self.compare(read_manifest(path))
        state, weights, average = read_checkpoint(path)
        load_strictly(self.model, weights, path)
        if self.averaged is not None:
            load_strictly(self.averaged, average or weights, path)
        restore_optimizer(self.optimizer, state.optimizer)
        if state.scaler:  # empty unless the run was in fp16
            self.precision.scaler.load_state_dict(state.scaler)
        self.meter.restore(state.meter, self.ranks)
        self.step, self.saved_step, self.guard.skipped = state.step, state.step, state.skipped
        self.ranks.wait()  # every rank has read it
        if self.ranks.first:
            self.checkpoints.set_aside(after=self.step)

    def compare(self, manifest: dict) -> None:
        """Show what this run does otherwise than the checkpoint's. Raises ValueError for what cannot change."""
        now = {**as_json(asdict(self.config)), "facts": as_json(self.facts())}
        changed = changes({**manifest["config"], "facts": manifest["facts"]}, now)
        refused = [line for name, line in changed.items() if name in FIXED]
        if refused and not self.config.run.allow_change:
            raise ValueError(
                f"{self.directory} holds a run with other settings: {'; '.join(refused)}. Use another --out_dir, or "
                "--allow_change to go on with its weights"
            )
        lines = list(changed.values())
        if manifest["micro_batch"] != self.micro_batch:
            lines.append(f"images of a rank at a time {manifest['micro_batch']} → {self.micro_batch}: other draws")
        if self.ranks.first:
            for line in lines:
                print(f"resumed with another setting: {line}", file=sys.stderr)

    @property
    def averaged(self) -> nn.Module | None:
        """The model with the moving average of the weights."""
        return self.ema.model if self.ema is not None else None

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a share of the model: then all ranks must run whatever runs it."""
        return False
