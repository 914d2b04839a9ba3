"""The loss of the tokenizer's training.

Legend: B batch, N vectors, s side of a scale, V codebook rows, D codebook width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import Discriminator, hinge_loss
from models.tokenizer import Tokenizer
from utils.config.tokenizer import TokenizerLossConfig
from utils.tokenizer.perceptual import Perceptual

TEMPERATURE = 0.01  # of the entropy term's soft choice among the rows
EPSILON, LARGEST = 1e-4, 1e4  # of the adaptive weight


class Reconstructions(NamedTuple):
    """A micro-batch at the sides of a step. Of these tensors only the loss has a gradient."""

    loss: Tensor
    parts: dict[str, Tensor]  # what the loss is made of
    codes: list[Tensor]  # (B, s²) of each side
    vectors: Tensor  # (N, D) of all sides, before quantisation
    real: list[Tensor]  # images at the resolution of each side
    made: list[Tensor]  # their reconstructions


class MultiScaleLoss(nn.Module):
    """Quantise at several sides, decode each at its own resolution, compare with the equally resized image.

    Reconstruction: --l1, --l2 and the perceptual distance. Codebook: the chosen rows towards the vectors. Commitment:
    the vectors towards the chosen rows. The image's gradient goes straight through the quantiser. Adversarial: what a
    discriminator says of the reconstructions. Resolutions too small for the perceptual network or the discriminator
    are not shown to it.
    """

    def __init__(self, vae: Tokenizer, config: TokenizerLossConfig, perceptual: Perceptual | None = None):
        super().__init__()
        self.vae, self.config, self.perceptual = vae, config, perceptual

    def forward(self, images: Tensor, sides: Sequence[int], judge: Discriminator | None = None) -> Reconstructions:
        """Images (B, 3, H, W) in [-1, 1] and sides, the finest last."""
        vae, config = self.vae, self.config
        found = vae.quantise(images, sides)
        made = found.images
        real = found.real or [resize_to(images, image.shape[-1]) for image in made]
        reconstruction, parts = self.reconstruction(made, real)
        discrete = bool(found.codes)
        parts |= {"codebook": found.codebook, "commitment": found.commitment} if discrete else {"kl": found.commitment}
        if config.entropy:
            rows: Tensor = vae.codebook  # type: ignore[assignment]
            parts["entropy"] = torch.stack([entropy_term(z, rows) for z in found.vectors]).mean()
        if judge is not None:
            reconstruction, added = self.against(judge, reconstruction, made)
            parts |= added
        loss = reconstruction + found.codebook + (config.commitment if discrete else config.kl) * found.commitment
        if config.entropy:
            loss = loss + config.entropy * parts["entropy"]
        parts = {name: value.detach() for name, value in parts.items()}
        vectors = torch.cat(found.vectors or [images.new_empty(0)]).detach()
        return Reconstructions(loss, parts, found.codes, vectors, real, [image.detach() for image in made])

    def reconstruction(self, made: list[Tensor], real: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted distances, and each by itself."""
        config, pairs = self.config, list(zip(made, real, strict=True))
        l1 = torch.stack([F.l1_loss(a, b) for a, b in pairs]).mean()
        l2 = torch.stack([F.mse_loss(a, b) for a, b in pairs])
        parts = {"l1": l1, "l2": l2.mean(), "l2_finest": l2[-1]}
        loss = config.l1 * l1 + config.l2 * parts["l2"]
        if self.perceptual is not None:
            shown = [(a, b) for a, b in pairs if a.shape[-1] >= self.perceptual.smallest]
            parts["perceptual"] = torch.stack([self.perceptual(a, b) for a, b in shown]).mean()
            loss = loss + config.perceptual_weight * parts["perceptual"]
        return loss, parts

    def against(
        self, judge: Discriminator, reconstruction: Tensor, made: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and adversarial loss together (VQGAN, Esser et al. 2021, Eq. 7).

        The adversarial weight is --disc_weight, times the ratio of both gradients' norms at the decoder's last layer.
        Both gradients are taken at the images, once; nothing reaches the discriminator's weights.
        """
        adversarial = torch.stack([-judge(image).mean() for image in large_enough(made, judge)]).mean()
        pulls = torch.autograd.grad(reconstruction, made)
        found = torch.autograd.grad(adversarial, made, allow_unused=True)
        pushes = [torch.zeros_like(image) if g is None else g for g, image in zip(found, made, strict=True)]
        weight = torch.full_like(adversarial, self.config.disc_weight)
        if self.config.disc_adaptive:
            last = self.vae.decoder.get_parameter("conv_out.weight")
            norms = [torch.autograd.grad(made, last, g, retain_graph=True)[0].norm() for g in (pulls, pushes)]
            weight = weight * (norms[0] / (norms[1] + EPSILON)).clamp(max=LARGEST)
        weight = weight.detach()
        gradients = [pull + weight * push for pull, push in zip(pulls, pushes, strict=True)]
        # A number that is the loss, with the gradient that was found at the images.
        carrier = sum((image * g).sum() for image, g in zip(made, gradients, strict=True))
        loss = (reconstruction + weight * adversarial).detach() + carrier - carrier.detach()
        return loss, {"adversarial": adversarial, "adversarial_weight": weight}


class Opponent(nn.Module):
    """The discriminator's own loss."""

    def __init__(self, discriminator: Discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: list[Tensor], made: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and their reconstructions, without gradient, at each resolution → the hinge loss, and mean logits."""
        losses: list[Tensor] = []
        sure: dict[str, list[Tensor]] = {"logits_real": [], "logits_made": []}
        pairs = [large_enough(images, self.discriminator) for images in (real, made)]
        for a, b in zip(*pairs, strict=True):
            logits = self.discriminator(torch.cat([a, b.to(a.dtype)])).chunk(2)
            losses.append(hinge_loss(*logits))
            for name, value in zip(sure, logits, strict=True):
                sure[name].append(value.detach().mean())
        loss = torch.stack(losses).mean()
        return loss, {"loss_disc": loss.detach(), **{name: torch.stack(v).mean() for name, v in sure.items()}}


def large_enough(images: list[Tensor], judge: Discriminator) -> list[Tensor]:
    return [image for image in images if image.shape[-1] >= judge.smallest]


def entropy_term(z: Tensor, rows: Tensor) -> Tensor:
    """Mean entropy of the vectors' (N, D) soft choices among the rows (V, D), less the entropy of the mean choice."""
    with torch.autocast(z.device.type, enabled=False):  # half precision would round the choice away
        # The squared distance of two unit vectors is 2 - 2·z·row. These logarithms are finite where a choice is out of
        # reach; the gradient of entr() is not.
        log_choice = (2 / TEMPERATURE * z.float() @ rows.float().T).log_softmax(-1)
        choice = log_choice.exp()
        mean = choice.mean(0)
        each, all_ = choice * log_choice, mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return all_.sum() - each.sum(-1).mean()


def resize_to(images: Tensor, side: int) -> Tensor:
    """Images at another resolution, by area."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="area")
