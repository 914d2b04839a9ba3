"""Train the multi-scale VQVAE: flags → config → build → fit."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sampling import evaluating
from models.vqvae import VQVAE, VQVAEConfig
from utils.config import TokenizerTrainConfig
from utils.data import Views, open_splits
from utils.distributed import Ranks
from utils.flags import parse
from utils.loop import Loop, Metrics, start
from utils.optim import derive_seed
from utils.pictures import grid


class MultiScaleLoss(nn.Module):
    """Quantise at several sides, decode each at its own resolution, compare with the equally resized image."""

    def __init__(self, vae: VQVAE, commitment: float):
        super().__init__()
        self.vae, self.commitment = vae, commitment

    def forward(self, images: Tensor, sides: list[int]) -> Metrics:
        """Images (B, 3, H, W) → loss and its parts, each a mean over the sides."""
        vae, factor = self.vae, self.vae.config.factor
        latent = vae.encode(images)
        pixel, codebook, commit = [], [], []
        for s in sides:
            z = vae.resize(latent, s)  # (B, s², D)
            rows = F.embedding(vae.quantize.nearest(z), vae.codebook)
            codebook.append(F.mse_loss(rows, z.detach()))
            commit.append(F.mse_loss(z, rows.detach()))
            straight_through = z + (rows - z).detach()
            target = resize_to(images, s * factor)
            pixel.append(F.mse_loss(vae.decode_vectors(straight_through, s), target))
        means = {
            name: torch.stack(parts).mean()
            for name, parts in [("pixel", pixel), ("codebook", codebook), ("commitment", commit)]
        }
        return {
            "loss": means["pixel"] + means["codebook"] + self.commitment * means["commitment"],
            "pixel_finest": pixel[-1],
            **means,
        }


class TokenizerTrainer(Loop):
    """Trains the VQVAE at the finest side and a few others, drawn anew each step."""

    def __init__(
        self,
        config: TokenizerTrainConfig,
        vae: VQVAE,
        train_set: Views,
        val_set: Views | None,
        ranks: Ranks,
    ):
        loss = MultiScaleLoss(vae, config.model.commitment)
        super().__init__(config, vae, train_set, val_set, ranks, forward=loss)

    def micro_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        with self.precision.autocast():
            losses = self.network(images, self.sides())
        return losses["loss"], {name: value.detach() for name, value in losses.items()}

    def sides(self) -> list[int]:
        """The sides of this step, the finest last: the same on every rank."""
        *coarse, finest = self.config.model.scales.sides
        rng = random.Random(f"sides/{self.config.run.seed}/{self.step}")
        return [*sorted(rng.sample(coarse, min(self.config.model.sides_per_step, len(coarse)))), finest]

    def held_out_losses(self, images: Tensor, labels: Tensor) -> Metrics:
        """Mean squared error of the reconstruction at every side, in [-1, 1] units, at that side's resolution."""
        latent = self.model.encode(images)
        losses = {}
        for s in self.config.model.scales.sides:
            target = resize_to(images, s * self.model.config.factor)
            losses[f"mse_side/{s}"] = F.mse_loss(self.model.decode(self.model.codes(latent, s), s), target)
        return {"loss": losses[f"mse_side/{s}"], **losses}

    @torch.no_grad()
    def picture(self) -> Tensor:
        """Held-out images (or training images, when there are none) over their reconstructions, side by side."""
        source = self.val_set or self.train_set
        n = min(self.config.watch.vis_num_samples, len(source))
        images = torch.stack([source[0, i * len(source) // n][0] for i in range(n)]).to(self.ranks.device)
        model, rows = self.averaged if self.config.watch.vis_ema else self.model, [images]
        with evaluating(model):
            latent = model.encode(images)
            for s in reversed(self.config.model.scales.sides):
                coarse = model.decode(model.codes(latent, s), s)
                rows.append(F.interpolate(coarse, images.shape[-2:], mode="nearest"))
        return grid(torch.cat(rows), columns=n)

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        vae = self.config.model
        return f"tokenizer: {parameters / 1e6:.1f} M parameters, codebook {vae.codebook_size} × {vae.codebook_dim}"


def resize_to(images: Tensor, side: int) -> Tensor:
    """Images at another resolution, by area."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="area")


def build(config: TokenizerTrainConfig, me: Ranks) -> TokenizerTrainer:
    """Data, tokenizer and trainer, at the run's newest checkpoint if it has one."""
    wanted = config.model
    torch.manual_seed(derive_seed("init", config.run.seed))
    vae = VQVAE(
        VQVAEConfig(
            base_width=wanted.base_width,
            width_mult=wanted.width_mult,
            res_blocks=wanted.res_blocks,
            z_channels=wanted.z_channels,
            codebook_size=wanted.codebook_size,
            codebook_dim=wanted.codebook_dim,
        )
    )
    if wanted.scales.sides[-1] * vae.config.factor != wanted.image_size:
        raise ValueError(
            f"--pn ends at {wanted.scales.sides[-1]}, but {wanted.image_size} pixels "
            f"make {wanted.image_size / vae.config.factor:g} latents a side"
        )
    train_set, val_set = open_splits(config.data, wanted.image_size, config.run.seed, config.run.directory)
    trainer = TokenizerTrainer(config, vae, train_set, val_set, me)
    trainer.resume()
    return trainer


def main() -> None:
    start(parse(TokenizerTrainConfig, description=__doc__), build)


if __name__ == "__main__":
    main()
