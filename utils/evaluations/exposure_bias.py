"""Exposure bias: likelihoods of held-out codes after true and after own inputs.

Legend: N images, B of them at a time, L tokens of a schedule, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.class_names import class_names
from models.head import Prediction, chunks
from models.pipeline import SARPipeline, open_pipeline
from models.run_record import find_run
from models.sampling import SamplingConfig, evaluating, generate_scales
from models.scales import ScaleSchedule
from utils.config.training import DataConfig
from utils.data.datasets import ImageDataset, encode_batch, open_dataset, plain_batches, plain_images
from utils.runtime.numerics import derive_seed

GREEDY = SamplingConfig(top_k=1, flow_steps=1)  # of a flow-matching head one step, to an estimate of the mean
BATCH = 8  # images at a time: of the largest models, a few GB


@dataclass
class ValidationSet:
    """Held-out images, their classes and codes, under one model. Nothing but the codes is kept of many images."""

    pipeline: SARPipeline  # on the GPU, if there is one
    views: ImageDataset
    labels: Tensor  # (N,)
    tokens: Tensor  # (N, L) ground truth

    @classmethod
    def of(
        cls,
        ckpt: str,
        data: DataConfig,
        n: int,
        vae_ckpt: str = "",
        pn: str = "",
        supervision: str = "",
        split: str = "val",
    ) -> ValidationSet:
        """At most n images, evenly over a split, not augmented; with split "train", images that were trained on.

        Their codes are made as the model's training made them, unless `supervision` names a way.
        """
        pipeline = open_pipeline(ckpt, vae_ckpt, pn)
        pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        schedule, vae = pipeline.schedule, pipeline.vae
        views = open_dataset(data, pipeline.side, 0, split)
        if views is None:
            raise ValueError(f"{data.data_path} has no val/ to take held-out images from")
        check_classes(ckpt, pipeline, views.classes)
        labels, tokens = [], []
        torch.manual_seed(derive_seed("validation", 0))  # of continuous latents, which are drawn
        for images, some in plain_batches(views, n, BATCH):
            batch = encode_batch(vae, images.to(pipeline.device), some, schedule, supervision or pipeline.supervision)
            labels.append(some)
            tokens.append(batch.tokens(schedule).cpu())
        return cls(pipeline, views, torch.cat(labels), torch.cat(tokens))

    @property
    def schedule(self) -> ScaleSchedule:
        return self.pipeline.schedule

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W), read again."""
        return plain_images(self.views, len(self.labels))[0]

    def batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Labels, and tensors of all images, a batch at a time and on the model's device."""
        for parts in zip(*(x.split(BATCH) for x in (self.labels, *tensors)), strict=True):
            yield tuple(part.to(self.pipeline.device) for part in parts)

    @torch.no_grad()
    def predict(self, fed: Tensor, sample: bool = False, scales: int = 0, first: int = 0) -> Iterator[Prediction]:
        """Predictions of the true tokens, a batch at a time, when tokens `fed` (N, L) make the inputs.

        With `sample` they hold the likeliest tokens. Of the scales from number `first` on; `scales`: pass the first so
        many through the model only, 0: all.
        """
        model, pathway = self.pipeline.model, self.pipeline.vae.pathway
        part = ScaleSchedule(self.schedule.sides[: scales or None])
        span = slice(part.offsets[first], part.total)
        with evaluating(model):
            for labels, tokens, truth in self.batches(fed, self.tokens[:, span]):
                inputs = model.inputs(tokens, pathway, self.schedule)
                shape = (len(labels), part.total - part.offsets[first])
                sampler = model.head.sampler(GREEDY, 0, shape[1], shape, labels.device) if sample else None
                yield model(labels, inputs, part, truth, first, sampler)

    def nll(self, fed: Tensor, scales: int = 0, first: int = 0) -> Tensor:
        """NLL of the true tokens (N, n): see `predict`."""
        return torch.cat([found.losses.cpu() for found in self.predict(fed, False, scales, first)])

    def predictions(self, fed: Tensor) -> Tensor:
        """The likeliest tokens (N, L) when tokens `fed` (N, L) make the inputs."""
        return torch.cat([found.sampled.cpu() for found in self.predict(fed, sample=True)])

    @torch.no_grad()
    def entropy(self) -> list[float]:
        """Mean entropy of each side's predictions after true inputs, in nats."""
        model, pathway, found = self.pipeline.model, self.pipeline.vae.pathway, []
        for labels, tokens in self.batches(self.tokens):
            with evaluating(model):
                x = model(labels, model.inputs(tokens, pathway, self.schedule), self.schedule, features=True)
            parts = [model.head(x[:, a:b]).float().softmax(-1) for a, b in chunks(*x.shape[:2])]
            found.append(torch.cat([torch.special.entr(p).sum(-1) for p in parts], dim=1).cpu())
        return per_side(torch.cat(found), self.schedule)

    @torch.no_grad()
    def drawn(self, seed: int, top_k: int = 0, on_truth: bool = False) -> Tensor:
        """Tokens (N, L) of the model's own autoregressive walk, without guidance; top-k 1 is greedy.

        With `on_truth` each scale is drawn after true coarser ones, and is not fed on.
        """
        model, pathway, found, done = self.pipeline.model, self.pipeline.vae.pathway, [], 0
        for labels, truth in self.batches(self.tokens):
            seeds = range(seed + done, seed + done + len(labels))
            noise = model.draw_noise(seeds, self.schedule, labels.device)
            own: dict[int, Tensor] = {}
            known = self.schedule.by_side(truth)

            def edit(s: int, codes: Tensor, own: dict = own, known: dict = known) -> Tensor:
                own[s] = codes
                return known[s] if on_truth else codes

            with evaluating(model):
                config = SamplingConfig(top_k=top_k)
                for _ in generate_scales(model, pathway, labels, self.schedule, config, noise, edit):
                    pass
            found.append(torch.cat(list(own.values()), dim=1).cpu())
            done += len(labels)
        return torch.cat(found)

    @torch.no_grad()
    def pictures(self, tokens: Tensor) -> dict[int, Tensor]:
        """Decoded tokens (N, L) of each scale: {side: (N, 3, factor·s, factor·s)}."""
        vae, device = self.pipeline.vae, self.pipeline.device
        codes = self.schedule.by_side(tokens.to(device))
        return {s: vae.decode_at(codes, s, self.schedule).cpu() for s in codes}


def check_classes(ckpt: str, pipeline: SARPipeline, classes: list[str]) -> None:
    """Raises ValueError when a run's classes are not those of the data: their labels would mean others."""
    run = find_run(ckpt)
    names = class_names(classes, pipeline.model.config.num_classes)
    if run is not None and run.class_names not in (None, names):
        raise ValueError(
            f"{run.directory} was trained on other classes ({', '.join(run.class_names[:3])} …) than the data's "
            f"({', '.join(names[:3])} …): give the run's own --dataset and --data_path"
        )


def per_side(values: Tensor, schedule: ScaleSchedule) -> list[float]:
    """Values of tokens (N, L) → their mean at each side."""
    return [part.double().mean().item() for part in schedule.split(values)]


@dataclass(frozen=True)
class Exposure:
    """Mean NLL of held-out codes at each side, in nats per token, by what the scales before it were.

    After `forced`, ground truth throughout. In `one_step`, the scale before is the model's own draw given true coarser
    ones, and nothing else is: one stagger-scale step. In `own`, all scales before are the model's own: the picture that
    it draws is another one than the held-out picture, so some of that gap is right.
    """

    forced: list[float]
    one_step: list[float]
    own: list[float]

    @classmethod
    def of(cls, data: ValidationSet, seed: int) -> Exposure:
        """Draws are without guidance, top-k and top-p; image i's from seed + i.

        Raises ValueError for a model of continuous tokens, which have no likelihood.
        """
        if not data.pipeline.model.config.codebook_size:
            raise ValueError("exposure bias is measured by the likelihood of codes: this model's tokens are continuous")
        schedule, truth = data.schedule, data.tokens
        forced = per_side(data.nll(truth), schedule)
        own = per_side(data.nll(data.drawn(seed)), schedule)
        drawn, one_step = data.drawn(seed, on_truth=True), forced[:1]
        for i in range(1, len(schedule)):
            fed, before = truth.clone(), schedule.span(i - 1)
            fed[:, before] = drawn[:, before]
            one_step.append(data.nll(fed, scales=i + 1, first=i).double().mean().item())
        return cls(forced, one_step, own)

    def gaps(self, kind: str) -> list[float]:
        """NLL after "one_step" or "own" inputs less that after true ones, at each side."""
        return [value - true for value, true in zip(getattr(self, kind), self.forced, strict=True)]
