"""Teacher forcing.

Legend: B batch, L tokens of a schedule, V codebook rows, D codebook width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from models.class_names import class_names
from models.flexvar import FlexVAR
from models.head import Prediction, Sampler
from models.layers import kernel_for
from models.run_record import describe_tokenizer
from models.sampling import TOP_K, TOP_P, Guidance, SamplingConfig, generate
from models.scales import ScaleSchedule, draw_schedule
from models.tokenizer import Tokenizer
from models.weights import digest_of
from utils.config.training import TrainConfig
from utils.data.datasets import CodeBatch, Examples, encode_batch
from utils.reporting.pictures import grid, spread_labels, square
from utils.runtime.distributed import Ranks, shard
from utils.training.loop import Loop
from utils.training.state import Metrics

Inputs = Tensor | tuple  # of a pass: whatever the model's own `inputs` makes
Encode = Callable[[Tensor, Tensor, ScaleSchedule], CodeBatch]  # what a data set yields, class ids, the step's scales


class Trainer(Loop):
    """Trains a scale-wise model by teacher forcing. Subclasses override `compute_loss`, and what they depend on beside
    it, `invariants`."""

    config: TrainConfig
    model: FlexVAR

    def __init__(
        self,
        config: TrainConfig,
        model: FlexVAR,
        vae: Tokenizer,
        train_set: Examples,
        val_set: Examples | None,
        ranks: Ranks,
        encode: Encode | None = None,
    ):
        """`encode` turns what the data sets yield into codes; by default they are images, for the tokenizer."""
        model.checkpoint_activations = config.speed.checkpoint_activations
        model.head.label_smoothing, model.scale_weights = config.optim.label_smoothing, config.optim.scale_weights
        super().__init__(config, model, train_set, val_set, ranks)
        if config.speed.compile:
            model.compile_parts()
        self.vae = vae.to(ranks.device)
        self.pathway = self.vae.pathway  # frozen
        self.encode = encode or partial(encode_batch, self.vae, supervision=config.model.supervision)

    def wrap_distributed(self) -> None:
        """DDP, or with --parallel fsdp each rank's share of the model and of its average."""
        if self.config.speed.parallel == "ddp":
            return super().wrap_distributed()
        averages: list[Any] = [average.model for average in self.averages.values()]
        for model in (self.model, *averages):
            methods = ("init_cache", "decode_scale")
            shard(model, model.shard_units(), self.precision.dtype, methods, trained=model is self.model)
        return None

    @cached_property
    def tokenizer(self) -> str:
        """SHA-256 of the tokenizer, which a run cannot change."""
        return digest_of(self.vae)

    @property
    def sharded(self) -> bool:
        return self.config.speed.parallel == "fsdp" and self.ranks.world > 1

    def invariants(self) -> dict[str, object]:
        return {
            **super().invariants(),
            "model_classes": self.model.config.num_classes,
            "tokenizer_sha256": self.tokenizer,
        }

    def beside_weights(self) -> dict[str, object]:
        options = self.model.config.tokenizer_options(self.config.model)
        return {name: value for name, value in options.items() if value}

    def config_record(self) -> dict[str, object]:
        return {
            **super().config_record(),
            "class_names": class_names(self.train_set.classes, self.model.config.num_classes),
            "tokenizer": describe_tokenizer(self.config.model.vae_ckpt, self.tokenizer, self.directory),
        }

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
        found = self.predict(batch.labels, self.inputs(tokens, schedule), tokens, schedule)
        return found.loss, {"loss": found.loss.detach(), **found.metrics(schedule)}

    def inputs(self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1) -> Inputs:
        """Tokens of all scales (B, L), true or sampled, shifted up one scale: what a pass is fed with (Eq. 2 and 6).

        Of the scales from number `first` on; for `truth` see the pathway.
        """
        return self.model.inputs(tokens, self.pathway, schedule, truth, first)

    def predict(
        self,
        labels: Tensor,
        inputs: Inputs,
        targets: Tensor,
        schedule: ScaleSchedule,
        first: int = 0,
        sampler: Sampler | None = None,
        start: bool = True,
    ) -> Prediction:
        """A pass through the network, and its loss at the scales from number `first` on: see `FlexVAR.forward`."""
        return self.network(labels, inputs, schedule, targets, first, sampler, start)

    def validation_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """Teacher-forced loss on the schedule --pn."""
        schedule = self.config.model.scales
        batch = self.encode(images, labels, schedule)
        with self.precision.autocast():
            return Trainer.compute_loss(self, batch, schedule)[1]

    def picture(self) -> Tensor:
        """Samples of fixed seeds and classes (3, H, W) in [0, 1]."""
        watch = self.config.watch
        model: Any = self.ema_model if watch.vis_ema else self.model
        n = watch.vis_num_samples
        with self.precision.autocast():
            sampling = SamplingConfig(Guidance("ramp", self.config.run.vis_cfg_scale), TOP_K, TOP_P)
            labels = spread_labels(n, model.config.num_classes)
            images = generate(model, self.vae, labels, self.config.model.scales, sampling, range(n))
        return grid(images, square(n))

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        kernel = kernel_for(self.ranks.device, self.precision.dtype)
        speed = self.config.speed
        parts = [
            f"{self.config.sar.training_mode}: {type(self.model).__name__}-d{self.model.config.depth}, "
            f"{parameters / 1e6:.1f} M parameters",
            f"attention by {kernel.name if kernel else 'PyTorch'}",
            f"codes from {speed.code_cache}" if speed.code_cache else "images encoded on the fly",
            *(["blocks compiled"] if speed.compile else []),
            *(["activations checkpointed"] if speed.checkpoint_activations else []),
            *(["sharded over the ranks"] if self.sharded else []),
        ]
        return ", ".join(parts)
