"""VAR's tokenizer, with the released key names: a residual quantiser over the scales (`models/residual_pathway.py`).

Legend: B batch, D codebook width, V codebook rows, s side of a scale, S side of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Decoder, Encoder, network_sizes
from models.residual_pathway import PHIS, KnownResiduals, ResidualPathway, ResidualQuantizer, as_vectors, phi_of
from models.scales import ScaleSchedule
from models.tokenizer import Quantised, Tokenizer, area
from models.vqvae import VQVAEConfig, count, norm


@dataclass(frozen=True)
class ResidualVQVAEConfig(VQVAEConfig):
    """Sizes; the defaults are vae_ch160v4096z32.pth (108.9 M parameters, 16× down-sampling)."""

    base_width: int = 160
    z_channels: int = 32
    codebook_size: int = 4096
    codebook_dim: int = 32
    counted_scales: int = 10  # rows of a buffer of released files, of usage statistics, that nothing reads

    pathway = "residual"
    tied_to_schedule = True
    unread = ("z_channels", "sides_per_step", "entropy", "kl", "equivariant")

    def __post_init__(self):
        super().__post_init__()
        if self.z_channels != self.codebook_dim:
            raise ValueError(f"a residual tokenizer has as many channels, {self.z_channels}, as codebook columns")

    def build(self) -> ResidualVQVAE:
        return ResidualVQVAE(self)

    @classmethod
    def from_flags(cls, flags: Any) -> ResidualVQVAEConfig:
        names = ("base_width", "width_mult", "res_blocks", "codebook_size", "codebook_dim")
        sizes = {name: getattr(flags, name) for name in names}
        return cls(**sizes, z_channels=flags.codebook_dim)

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        return "quantize.quant_resi.qresi_ls.0.weight" in weights

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        phis = count(weights, lambda i: f"quantize.quant_resi.qresi_ls.{i}.weight")
        if phis != PHIS:
            raise ValueError(f"its scales share {phis} convolutions; {PHIS} are known here")
        counted = weights.get("quantize.ema_vocab_hit_SV", torch.empty(0))
        rows, dim = weights["quantize.embedding.weight"].shape
        codebook = {"codebook_size": rows, "codebook_dim": dim, "z_channels": dim, "counted_scales": len(counted)}
        return {**network_sizes(weights), **codebook}


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual; q, k, v from one convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.proj_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (B, h·w, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class ResidualVQVAE(Tokenizer):
    """Images in [-1, 1] ↔ codes of the sides of one schedule, each of which adds to what the coarser ones say."""

    config: ResidualVQVAEConfig
    supervisions = ("latent",)

    def __init__(self, config: ResidualVQVAEConfig | None = None):
        super().__init__()
        self.config = config = config or ResidualVQVAEConfig()
        sizes = (config.base_width, config.width_mult, config.res_blocks, config.z_channels)
        last = (len(config.width_mult) - 1,)
        self.encoder = Encoder(*sizes, AttnBlock, last)
        self.decoder = Decoder(*sizes, AttnBlock, last)
        self.quantize = ResidualQuantizer(config.codebook_size, config.codebook_dim, config.counted_scales)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 3, padding=1)

    @property
    def codebook(self) -> Tensor:
        """The rows as they are (V, D)."""
        return self.quantize.embedding.weight

    @property
    def pathway(self) -> ResidualPathway:
        return ResidualPathway(self.quantize)

    def freeze_unused(self, schedule: ScaleSchedule) -> None:
        used = {phi_of(i, len(schedule)) for i in range(len(schedule))}
        for number, phi in self.quantize.quant_resi["qresi_ls"].named_children():
            phi.requires_grad_(int(number) in used)

    def codes_of_images(self, images: Tensor, sides: Sequence[int], supervision: str) -> dict[int, Tensor]:
        known, codes = self.known_of_images(images, ScaleSchedule(tuple(sides)), supervision), {}
        for s in sides:
            codes[s] = known.at(s)
            known.add(s, codes[s])
        return codes

    def known_of_images(self, images: Tensor, schedule: ScaleSchedule, supervision: str) -> KnownResiduals:
        """Codes of images that make up for whatever the coarser scales were given."""
        latent = self.encode(images)
        check_side(latent, schedule)
        return KnownResiduals(self.pathway, latent, schedule)

    def decode_at(self, codes: Mapping[int, Tensor], s: int, schedule: ScaleSchedule) -> Tensor:
        canvas = self.pathway.canvas(schedule)
        for i in range(schedule.sides.index(s) + 1):
            canvas.add(i, codes[schedule.sides[i]])
        return self.decode_maps(canvas.maps)

    def decode_inputs(self, codes: Mapping[int, Tensor], i: int, schedule: ScaleSchedule) -> Tensor:
        return self.decode_at(codes, schedule.sides[i - 1], schedule)

    def pixels(self, s: int, schedule: ScaleSchedule) -> int:
        """Pixels of the whole image: a canvas has its full side from the first scale on."""
        return schedule.sides[-1] * self.config.factor

    def quantise(self, images: Tensor, sides: Sequence[int]) -> Quantised:
        """One picture, of the last canvas; distances of the latent to the canvas, a mean over the scales."""
        latent, schedule = self.encode(images), ScaleSchedule(tuple(sides))
        check_side(latent, schedule)
        found = self.distances(latent, schedule)
        canvas = latent + (found.images[0] - latent).detach()
        return found._replace(images=[self.decode_maps(canvas)])

    def distances(self, latent: Tensor, schedule: ScaleSchedule) -> Quantised:
        """`quantise` of a latent (B, D, S, S), with the last canvas in place of the picture."""
        pathway, rest, canvas = self.pathway, latent.detach(), torch.zeros_like(latent)
        codes, vectors, codebook, commitment = [], [], [], []
        for i, s in enumerate(schedule.sides):
            vectors.append(as_vectors(area(rest, s)))  # (B, s², D)
            codes.append(self.quantize.nearest(vectors[-1]))
            residual = pathway.residual(i, codes[-1], schedule)
            rest, canvas = rest - residual.detach(), canvas + residual
            codebook.append(F.mse_loss(canvas, latent.detach()))
            commitment.append(F.mse_loss(canvas.detach(), latent))
        flat = [x.flatten(0, 1) for x in vectors]
        return Quantised(codes, flat, [canvas], torch.stack(codebook).mean(), torch.stack(commitment).mean())


def check_side(latent: Tensor, schedule: ScaleSchedule) -> None:
    """Raises ValueError unless the last side of the schedule is the latent's."""
    if latent.shape[-2:] != (schedule.sides[-1], schedule.sides[-1]):
        raise ValueError(f"the scales end at side {schedule.sides[-1]}, the latent has {tuple(latent.shape[-2:])}")
