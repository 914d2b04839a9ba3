"""Train a tokenizer: flags → config → build → fit."""

from __future__ import annotations

import utils.runtime.threads  # noqa: F401  # isort: skip

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import Discriminator
from models.generators import TOKENIZERS
from models.sampling import evaluating
from models.tokenizer import Tokenizer, from_bytes
from models.weights import find_weights, load_strictly, read_state_dict
from pretrained.download import offer
from utils.config.tokenizer import TokenizerTrainConfig
from utils.data.datasets import ImageDataset, check_dataset, linspace_indices, open_splits
from utils.reporting.pictures import grid
from utils.runtime.checkpoint import checkpoints
from utils.runtime.distributed import Ranks, data_parallel
from utils.runtime.entry import entry
from utils.runtime.flags import parse
from utils.runtime.numerics import derive_seed
from utils.tokenizer.codebook import CodebookUse, histogram, perplexity, revive, usage
from utils.tokenizer.losses import MultiScaleLoss, Opponent, resize_to
from utils.tokenizer.perceptual import make_perceptual
from utils.training.loop import Loop, start
from utils.training.state import Metrics


class TokenizerTrainer(Loop):
    """Trains a tokenizer at the finest side and a few others, drawn anew each step; a discriminator along with it.

    Where codes depend on the schedule, at all of its sides.

    Rows of the codebook that no side used for --usage_every steps are put where the latents are.
    """

    config: TokenizerTrainConfig
    model: Tokenizer

    def __init__(
        self,
        config: TokenizerTrainConfig,
        vae: Tokenizer,
        train_set: ImageDataset,
        val_set: ImageDataset | None,
        ranks: Ranks,
    ):
        wanted, sides = config.loss, config.model.scales.sides
        shown = config.model.image_size // (4 if wanted.equivariant else 1)  # the smallest picture that is compared
        why = ", with --equivariant four times as large" if wanted.equivariant else ""
        self.use = CodebookUse(sides, vae.config.codebook_size)
        auxiliary: dict[str, nn.Module] = {"codebook_use": self.use}
        self.opponent: nn.Module | None = None
        if wanted.disc_weight:
            discriminator = Discriminator(wanted.disc_width, wanted.disc_layers)
            if discriminator.smallest > shown:
                raise ValueError(
                    f"--disc_layers {wanted.disc_layers} needs images of {discriminator.smallest} pixels{why}"
                )
            auxiliary["discriminator"], self.opponent = discriminator, Opponent(discriminator)
        perceptual = make_perceptual(wanted.perceptual, wanted.perceptual_weights)
        if perceptual is not None and perceptual.smallest > shown:
            raise ValueError(f"--perceptual {wanted.perceptual} needs images of {perceptual.smallest} pixels{why}")
        loss = MultiScaleLoss(vae, wanted, perceptual)
        super().__init__(config, vae, train_set, val_set, ranks, loss, auxiliary)
        if self.opponent is not None:
            if ranks.world > 1:
                self.opponent = data_parallel(self.opponent)
            self.networks.append(self.opponent)
        self.counted = torch.zeros_like(self.use.counts)  # (S, V) codes of this step and rank
        self.offers: list[Tensor] = []  # vectors of this step and rank for unused rows, from each micro-batch

    def invariants(self) -> dict[str, object]:
        loss = self.config.loss
        network = f"{loss.disc_width} wide, {loss.disc_layers} layers" if loss.disc_weight else "none"
        return {**super().invariants(), "discriminator": network}

    def micro_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        images, sides = from_bytes(images), self.sides()
        judge = self.auxiliary["discriminator"] if self.adversarial() else None
        with self.precision.autocast():
            found = self.network(images, sides, judge)
        loss, metrics = found.loss, {"loss": found.loss.detach(), **found.parts}
        if judge is not None:
            with self.precision.autocast():
                opposed, described = self.opponent(found.real, found.made)
            loss, metrics = loss + opposed, {**metrics, **described}
        for s, codes in zip(sides if found.codes else [], found.codes, strict=True):
            self.counted[self.use.sides.index(s)] += histogram(codes, self.counted.shape[1])
        if self.window_ends and self.config.loss.revive and found.codes:
            each = -(-len(self.counted[0]) // (self.accumulate * self.ranks.world))  # so that there is one for each row
            self.offers.append(found.vectors[torch.randint(len(found.vectors), (each,), device=images.device)])
        return loss, metrics

    def sides(self) -> list[int]:
        """The sides of this step, the finest last: the same on every rank."""
        *coarse, finest = self.config.model.scales.sides
        if self.model.config.tied_to_schedule:
            return [*coarse, finest]
        rng = random.Random(f"sides/{self.config.run.seed}/{self.step}")
        return [*sorted(rng.sample(coarse, min(self.config.model.sides_per_step, len(coarse)))), finest]

    def adversarial(self) -> bool:
        """True when the discriminator takes part in this step."""
        return self.opponent is not None and self.step >= self.config.loss.disc_start

    @property
    def window_ends(self) -> bool:
        """True for the last step that the codes are counted over."""
        return (self.step + 1) % self.config.loss.usage_every == 0

    @torch.no_grad()
    def on_step_end(self, skip: Tensor) -> None:
        """Count the step's codes; at the end of a window log the use of the rows, and revive those without any."""
        if not self.model.config.codebook_size:
            return
        self.use.counts += self.ranks.sum(self.counted)
        self.counted.zero_()
        if not self.window_ends:
            return
        found = self.use.metrics()
        if self.offers:
            mine = torch.stack(self.offers)  # (accumulate, each, D)
            everyones = mine.new_zeros(len(mine), self.ranks.world, *mine.shape[1:])
            everyones[:, self.ranks.rank] = mine
            offers = self.ranks.sum(everyones).flatten(0, 2)[: self.use.counts.shape[1]]  # (V, D)
            models: list[Any] = [self.model, *(average.model for average in self.averages.values())]
            dead = self.use.unused() & (skip == 0)  # a dropped step changes no weight
            found["revived"] = revive([model.quantize.embedding.weight for model in models], dead, offers)
            self.offers.clear()
        self.meter.add(found, weight=self.accumulate)
        self.use.counts.zero_()

    def validation_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """At every side: mean squared error of the reconstruction, in [-1, 1] units and at that side's resolution, and
        how often each row is chosen (V,)."""
        images, schedule, found = from_bytes(images), self.config.model.scales, {}
        codes = self.model.tokenize(images, schedule.sides)
        for s in schedule.sides:
            made = self.model.decode_at(codes, s, schedule)
            found[f"mse_side/{s}"] = F.mse_loss(made, resize_to(images, made.shape[-1]))
            if codes[s].is_floating_point():
                continue
            found[f"chosen_side/{s}"] = histogram(codes[s], self.model.config.codebook_size) / len(images)
        return {"loss": found[f"mse_side/{s}"], **found}

    def conclude(self, means: Metrics) -> Metrics:
        for s in self.config.model.scales.sides:
            if f"chosen_side/{s}" not in means:
                continue
            chosen = means.pop(f"chosen_side/{s}")
            means |= {f"usage_side/{s}": usage(chosen), f"perplexity_side/{s}": perplexity(chosen)}
        return means

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Held-out images (or training images, when there are none) over their reconstructions, side by side."""
        source = self.val_set or self.train_set
        n = min(self.config.watch.vis_num_samples, len(source))
        images = torch.stack([source[0, i][0] for i in linspace_indices(n, len(source))]).to(self.ranks.device)
        model, rows = self.ema_model if self.config.watch.vis_ema else self.model, [images]
        schedule = self.config.model.scales
        with evaluating(model):
            codes = model.tokenize(images, schedule.sides)
            for s in reversed(schedule.sides):
                coarse = model.decode_at(codes, s, schedule)
                rows.append(F.interpolate(coarse, images.shape[-2:], mode="nearest"))
        return grid(torch.cat(rows), columns=n)

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        vae, loss = self.config.model, self.config.loss
        codes = f"codebook {vae.codebook_size} × {vae.codebook_dim}"
        continuous = f"{vae.z_channels} continuous channels"
        parts = [f"tokenizer: {parameters / 1e6:.1f} M parameters"]
        parts += [codes if self.model.config.codebook_size else continuous]
        parts += [f"perceptual distance by {loss.perceptual}"] if loss.perceptual != "none" else []
        parts += [f"a discriminator from step {loss.disc_start} on"] if loss.disc_weight else []
        return ", ".join(parts)


def build(config: TokenizerTrainConfig, me: Ranks) -> TokenizerTrainer:
    """Data, tokenizer and trainer, at the run's newest checkpoint if it has one."""
    wanted = config.model
    torch.manual_seed(derive_seed("init", config.run.seed))
    vae = TOKENIZERS[wanted.quantiser].from_flags(wanted).build()
    vae.equivariant = config.loss.equivariant
    vae.freeze_unused(wanted.scales)
    vae.to(memory_format=torch.channels_last)  # which convolutions are faster in
    if wanted.init_ckpt and not checkpoints(config.run.directory):  # a run that goes on reads its own
        load_strictly(vae, dict(vae.config.adapted(read_state_dict(wanted.init_ckpt))), wanted.init_ckpt)
    if wanted.scales.sides[-1] * vae.config.factor != wanted.image_size:
        raise ValueError(
            f"--pn ends at {wanted.scales.sides[-1]}, but {wanted.image_size} pixels "
            f"make {wanted.image_size / vae.config.factor:g} latents a side"
        )
    train_set, val_set = open_splits(config.data, wanted.image_size, config.run.seed, config.run.directory)
    trainer = TokenizerTrainer(config, vae, train_set, val_set, me)
    trainer.resume()
    return trainer


def check(config: TokenizerTrainConfig) -> None:
    """Checks that the files that the flags name are there, and what else the losses need."""
    check_dataset(config.data)
    if config.model.init_ckpt and not checkpoints(config.run.directory):
        offer(config.model.init_ckpt)
        find_weights(config.model.init_ckpt)
    make_perceptual(config.loss.perceptual, config.loss.perceptual_weights)  # fetched once, before ranks ask for it


@entry
def main() -> None:
    start(parse(TokenizerTrainConfig, description=__doc__), build, check)


if __name__ == "__main__":
    main()
