"""The loop of every training run, and teacher forcing.

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.flexvar import FlexVAR
from models.head import Look, head_losses
from models.layers import kernel_for
from models.sampling import Guidance, evaluating, generate
from models.scales import ScaleSchedule, draw_schedule, shift_all
from models.vqvae import VQVAE
from utils.checkpoint import RunState, latest_checkpoint, load_checkpoint, save_checkpoint
from utils.config import TokenizerTrainConfig, TrainConfig
from utils.data import CodeBatch, StepSampler, Views, accumulation, encode_batch, make_loader
from utils.distributed import Ranks, data_parallel, gathered, shard
from utils.log import Meter, Progress, make_logger
from utils.optim import MovingAverage, Precision, derive_seed, learning_rate, make_optimizer, restore_optimizer, update
from utils.pictures import grid, save_picture, spread_labels, square

Metrics = dict[str, Tensor]
Encode = Callable[[Tensor, Tensor, ScaleSchedule], CodeBatch]  # what a data set yields, class ids, the step's scales


class Loop(ABC):
    """What every training run shares: the loop, one optimiser step, saving and resuming.

    All randomness of a step is a function of (seed, step, micro-batch index), so that a resumed run, or one on
    another number of ranks with the same micro-batch, trains identically.
    """

    def __init__(
        self,
        config: TrainConfig | TokenizerTrainConfig,
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
        self.sharded = False  # then all ranks must run whatever runs the model
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
        self.step = 0
        self.meter = Meter()

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

    def fit(self) -> None:
        """Train to the end, from where `resume` left off."""
        run, watch = self.config.run, self.config.watch
        log = make_logger(self.config.log, self.ranks, self.directory, run.exp_name, asdict(self.config), self.step)
        progress = Progress(run.exp_name, self.stop_step, self.step, self.ranks)
        progress.say(self.describe())
        progress.say(self.describe_batch())
        batches = iter(self.loader())
        try:
            while self.step < self.stop_step:
                self.train_step(batches)
                progress.advance(self.config.optim.bs)
                if self.due(self.config.log.log_every):
                    values = self.meter.means(self.ranks)
                    values["images_per_second"] = progress.rate()
                    values["lr"] = self.optimizer.param_groups[0]["lr"]
                    log.scalars({f"train/{name}": value for name, value in values.items()}, self.step)
                    progress.show({name: values[name] for name in ("loss", "images_per_second", "lr")})
                    self.check_finite(values)
                if self.due(watch.eval_every) and self.held_out_images:
                    values = self.held_out()
                    log.scalars({f"val/{name}": value for name, value in values.items()}, self.step)
                    progress.say(f"step {self.step}: held-out loss {values['loss']:.4f}")
                if self.due(watch.vis_every) and watch.vis_num_samples and (self.ranks.first or self.sharded):
                    picture = self.picture()
                    if self.ranks.first:
                        save_picture(picture, self.directory / f"samples/step_{self.step:07d}.png")
                        log.image("samples", picture, self.step)
                if self.due(run.save_every_steps or self.epoch_steps):
                    if self.meter.sums:  # steps since the last log line: nothing unchecked is saved
                        self.check_finite(self.meter.peek(self.ranks))
                    self.save()
        finally:
            progress.close()
            log.close()

    def check_finite(self, values: dict[str, float]) -> None:
        """Stop at a loss or gradient that is not finite. (In fp16 a gradient may overflow: the scaler sees to it.)"""
        for name in ("loss",) if self.precision.name == "fp16" else ("loss", "gradient_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(f"the {name} is {values[name]} at step {self.step}")

    def loader(self) -> DataLoader:
        """The micro-batches of this rank from the current step to the last."""
        sampler = StepSampler(
            len(self.train_set),
            self.config.run.seed,
            self.config.optim.bs,
            self.micro_batch,
            self.ranks,
            self.step,
            self.stop_step,
        )
        return make_loader(self.train_set, sampler, self.config.data.workers, self.ranks.device)

    def due(self, every: float) -> bool:
        """Whether the step just done ends a stretch of `every` steps (0: only the last step does)."""
        if self.step == self.stop_step:
            return True
        return every > 0 and int(self.step / every) > int((self.step - 1) / every)

    def train_step(self, batches: Iterator) -> None:
        """One optimiser step over the micro-batches of this rank."""
        optim = self.config.optim
        for i in range(self.accumulate):
            images, labels = (x.to(self.ranks.device, non_blocking=True) for x in next(batches))
            micro_batch = i * self.ranks.world + self.ranks.rank
            torch.manual_seed(derive_seed("step", self.config.run.seed, self.step, micro_batch))
            with self.gradients_stay_here(i + 1 < self.accumulate):
                loss, metrics = self.micro_loss(images, labels)
                self.precision.scaler.scale(loss / self.accumulate).backward()
            self.meter.add(metrics)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, optim)
        norm = update(self.model, self.optimizer, self.precision, optim.tclip)
        if self.ema is not None:
            self.ema.update(self.model)
        self.meter.add({"gradient_norm": norm})
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

    def save(self) -> None:
        """Everything that `resume` needs."""
        models = (self.model, self.averaged)
        weights, average = (gathered(m.state_dict()) if m is not None else None for m in models)
        state = RunState(self.step, gathered(self.optimizer.state_dict()), self.precision.scaler.state_dict())
        if self.ranks.first:
            save_checkpoint(self.directory, state, weights, average, self.config.run.keep)
        self.ranks.wait()

    def resume(self) -> None:
        """Go on from the newest checkpoint of this run's directory."""
        newest = latest_checkpoint(self.directory)
        found = torch.tensor(float(newest.name.removeprefix("step_")) if newest else 0.0, device=self.ranks.device)
        if self.ranks.mean(found) != found:
            raise ValueError(
                f"the ranks see different checkpoints in {self.directory}: it must be one shared directory"
            )
        if newest is None:
            return
        state = load_checkpoint(newest, self.model, self.averaged)
        restore_optimizer(self.optimizer, state.optimizer)
        if state.scaler:  # empty unless the run was in fp16
            self.precision.scaler.load_state_dict(state.scaler)
        self.step = state.step

    @property
    def averaged(self) -> nn.Module | None:
        """The model with the moving average of the weights."""
        return self.ema.model if self.ema is not None else None


class Trainer(Loop):
    """Trains FlexVAR by teacher forcing. Subclasses override `compute_loss` and nothing else."""

    def __init__(
        self,
        config: TrainConfig,
        model: FlexVAR,
        vae: VQVAE,
        train_set: Views,
        val_set: Views | None,
        ranks: Ranks,
        encode: Encode | None = None,
    ):
        """`encode` turns what the data sets yield into codes; by default they are images, for the tokenizer."""
        model.checkpoint_activations = config.speed.checkpoint_activations
        super().__init__(config, model, train_set, val_set, ranks)
        if config.speed.compile:
            for block in model.blocks:
                block.compile_parts()
        self.vae = vae.to(ranks.device)
        self.codebook = self.vae.codebook  # (V, D), frozen
        self.encode = encode or partial(encode_batch, self.vae, supervision=config.model.supervision)

    def spread(self) -> None:
        """DDP, or with --parallel fsdp each rank's share of the model and of its average."""
        if self.config.speed.parallel == "ddp":
            return super().spread()
        for model in filter(None, (self.model, self.averaged)):
            shard(model, model.shard_units(), methods=("begin", "step"))
        self.sharded = True
        return None

    def micro_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        schedule = self.schedule()
        batch = self.encode(images, self.drop_classes(labels), schedule)
        with self.precision.autocast():
            return self.compute_loss(batch, schedule)

    def schedule(self) -> ScaleSchedule:
        """The scales of this step, the same on every rank."""
        model = self.config.model
        return draw_schedule(self.config.run.seed, self.step) if model.schedule == "flexvar" else model.scales

    def drop_classes(self, labels: Tensor) -> Tensor:
        """Class dropout (B,): drawn here, once a step, and so shared by all passes of it."""
        drop = torch.rand(len(labels), device=labels.device) < self.config.model.label_drop
        return labels.masked_fill(drop, self.model.null_class)

    def compute_loss(self, batch: CodeBatch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        """Teacher forcing: mean cross-entropy over all tokens, with inputs from ground truth (paper Eq. 2)."""
        tokens = batch.tokens(schedule)
        loss, metrics = self.token_loss(batch.labels, shift_all(tokens, self.codebook, schedule), schedule, tokens)
        return loss, {"loss": loss.detach(), **metrics}

    def token_loss(
        self,
        labels: Tensor,
        inputs: Tensor,
        schedule: ScaleSchedule,
        targets: Tensor,
        first: int = 0,
        start: bool = True,
        look: Look | None = None,
    ) -> tuple[Tensor, Metrics]:
        """A forward through the network and its mean loss at the scales from number `first` on.

        Args:
            labels, inputs, schedule, start: see `FlexVAR.forward`.
            targets: of these scales, tokens (B, n) or the logits to match (B, n, V).
            look: is shown their logits, see `head_losses`.

        Returns: the loss, and loss and accuracy of each side.
        """
        scales = ScaleSchedule(schedule.sides[first:])

        def read(features: Tensor, head: nn.Linear) -> tuple[Tensor, ...]:
            return head_losses(features[:, schedule.offsets[first] :], head, targets, look)

        loss, losses, hits = self.network(labels, inputs, schedule, start, read)
        metrics = {}
        for s, side_losses, side_hits in zip(scales.sides, scales.split(losses), scales.split(hits), strict=True):
            metrics[f"loss_side/{s}"] = side_losses.mean()
            metrics[f"accuracy_side/{s}"] = side_hits.mean()
        return loss, metrics

    def held_out_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """Teacher-forced loss on the schedule --pn."""
        schedule = self.config.model.scales
        batch = self.encode(images, labels, schedule)
        with self.precision.autocast():
            return Trainer.compute_loss(self, batch, schedule)[1]

    def picture(self) -> Tensor:
        """Samples of fixed seeds and classes (3, H, W) in [0, 1]."""
        watch = self.config.watch
        model = self.averaged if watch.vis_ema else self.model
        n = watch.vis_num_samples
        with self.precision.autocast():
            images = generate(
                model,
                self.vae,
                spread_labels(n, model.config.num_classes),
                self.config.model.scales,
                Guidance("ramp", self.config.run.vis_cfg_scale),
                top_k=900,
                top_p=0.95,
                seeds=range(n),
            )
        return grid(images, square(n))

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        kernel = kernel_for(self.ranks.device, self.precision.dtype)
        speed = self.config.speed
        parts = [
            f"{self.config.sar.training_mode}: FlexVAR-d{self.model.config.depth}, {parameters / 1e6:.1f} M parameters",
            f"attention by {kernel[0] if kernel else 'PyTorch'}",
            f"codes from {speed.code_cache}" if speed.code_cache else "images encoded on the fly",
            *(["blocks compiled"] if speed.compile else []),
            *(["activations checkpointed"] if speed.checkpoint_activations else []),
            *(["sharded over the ranks"] if self.sharded else []),
        ]
        return ", ".join(parts)
