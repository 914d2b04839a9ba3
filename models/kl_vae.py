"""KL autoencoders: latent-diffusion's, MAR's and diffusers' files, and the pathway of their continuous latents.

Legend: B batch, z latent channels, D width of a token (z·patch²), h × w latent sides, s side of a scale, S the finest.

A token is a patch × patch square of the latent; a scale of side s is the latent at side patch·s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Decoder, Encoder, levels_with_attention, network_sizes
from models.scales import ScaleSchedule, UpsamplingPathway
from models.tokenizer import KnownCodes, Quantised, Tokenizer, area, exact_convolutions, from_bytes
from models.vqvae import AttnBlock, VQVAEConfig

NO_VARIANCE = -60.0  # a log-variance whose noise is nothing, in half precision, too
# What 1/std of the latents of published files is, by (channels, levels, attention in the decoder's levels). A file of
# such sizes and other weights is taken for one of those: its own is named by --latent_scaling.
SCALINGS = {(16, 5, False): 0.2325, (4, 4, False): 0.18215}
UNKNOWN = -1.0  # scaling of an autoencoder whose sizes are published ones, and whose weights are not


@dataclass(frozen=True)
class KLConfig(VQVAEConfig):
    """Sizes; the defaults are MAR's kl16.ckpt (66.5 M parameters, 16× down-sampling)."""

    z_channels: int = 16
    codebook_size: int = 0  # its tokens are no codes
    codebook_dim: int = 0  # width of a token: z_channels · patch²
    encoder_attention: tuple[int, ...] = (4,)  # numbers of the levels with attention, beside the middle
    decoder_attention: tuple[int, ...] = ()
    patch: int = 0  # side of a token in latents; 0: two for 8× down-sampling, else one
    scaling: float = 0.0  # latents are multiplied by this; 0: what is published for such a file
    through_pixels: bool = False  # a scale is fed with the picture of the one before, raised and encoded

    pathway = "latent"
    tied_to_schedule = True  # as a cache is
    unread = ("codebook_size", "codebook_dim", "sides_per_step", "entropy", "commitment", "usage_every", "revive")

    def __post_init__(self):
        super().__post_init__()
        levels = len(self.width_mult)
        if self.patch < 0:
            raise ValueError(f"a token of {self.patch} latents a side: --latent_patch must be at least 0")
        object.__setattr__(self, "patch", self.patch or (2 if levels == 4 else 1))
        object.__setattr__(self, "codebook_dim", self.z_channels * self.patch**2)
        known = SCALINGS.get((self.z_channels, levels, bool(self.decoder_attention)), 0.0)
        object.__setattr__(self, "scaling", self.scaling or known)
        for name in ("encoder_attention", "decoder_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def factor(self) -> int:
        """Pixels of an image side for each token."""
        return self.down_sampling * self.patch

    @property
    def down_sampling(self) -> int:
        """Pixels of an image side for each latent."""
        return 2 ** (len(self.width_mult) - 1)

    def unpublished(self) -> KLConfig:
        return replace(self, scaling=UNKNOWN)

    def build(self) -> KLAutoencoder:
        return KLAutoencoder(self)

    @classmethod
    def from_flags(cls, flags: Any) -> KLConfig:
        names = ("base_width", "width_mult", "res_blocks", "z_channels")
        last = (len(flags.width_mult) - 1,)  # scaled by 1: of its own training nothing depends on it
        return cls(**{name: getattr(flags, name) for name in names}, encoder_attention=last, scaling=1.0)

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        mine = {"encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"} & weights.keys()
        return bool(mine) and "quantize.embedding.weight" not in weights

    @classmethod
    def adapted(cls, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under latent-diffusion's names, from diffusers' or its own, without its losses' networks."""
        found = {name: tensor for name, tensor in weights.items() if not name.startswith("loss.")}
        return from_diffusers(found) if "encoder.down_blocks.0.resnets.0.conv1.weight" in found else found

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        attention = {
            "encoder_attention": levels_with_attention(weights, "encoder.down"),
            "decoder_attention": levels_with_attention(weights, "decoder.up"),
        }
        return {**network_sizes(weights), "z_channels": weights["post_quant_conv.weight"].shape[0], **attention}


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers' names → under latent-diffusion's, whose up-levels count from fine to coarse."""
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    rules: list[tuple[str, str | Callable[[re.Match], str]]] = [
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block."),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"attn_1\.group_norm\.", "attn_1.norm."),
        (r"attn_1\.(?:to_q|query)\.", "attn_1.q."),
        (r"attn_1\.(?:to_k|key)\.", "attn_1.k."),
        (r"attn_1\.(?:to_v|value)\.", "attn_1.v."),
        (r"attn_1\.(?:to_out\.0|proj_attn)\.", "attn_1.proj_out."),
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
    ]
    found = {}
    for name, tensor in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        is_linear = "attn_1" in name and name.endswith("weight") and tensor.ndim == 2
        found[name] = tensor[:, :, None, None] if is_linear else tensor
    return found


class KLAutoencoder(Tokenizer):
    """Images in [-1, 1] ↔ latents of every side, drawn from their posterior."""

    config: KLConfig
    supervisions = ("latent", "image", "image_pixels")

    def __init__(self, config: KLConfig | None = None):
        super().__init__()
        self.config = config = config or KLConfig()
        sizes, z = (config.base_width, config.width_mult, config.res_blocks), config.z_channels
        self.encoder = Encoder(*sizes, 2 * z, AttnBlock, config.encoder_attention)
        self.decoder = Decoder(*sizes, z, AttnBlock, config.decoder_attention)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    @property
    def scaling(self) -> float:
        """Factor that latents are multiplied by. Raises ValueError when none is known."""
        if self.config.scaling <= 0:
            raise ValueError(
                "no latent scaling is published for such an autoencoder: measure it by "
                "python -m utils.tokenizer.scaling, and give it by --latent_scaling"
            )
        return self.config.scaling

    @property
    def pathway(self) -> LatentPathway:
        if self.config.through_pixels:
            return PixelPathway(self)
        return LatentPathway(self.config.patch, self.config.z_channels)

    def moments(self, images: Tensor, multiple: int = 0) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → mean and log-variance (B, z, h, w) of their latents. See `encode`."""
        mean, log_variance = self.encode(images, multiple).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def latents(self, mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw of the latents (B, z, h, w), scaled; without noise their mean."""
        return (mean if noise is None else mean + (0.5 * log_variance).exp() * noise) * self.scaling

    def codes_of_images(self, images: Tensor, sides: Sequence[int], supervision: str) -> dict[int, Tensor]:
        return self.from_moments(self.moments_of(images, sides, supervision), sides)

    def moments_of(self, images: Tensor, sides: Sequence[int], supervision: str) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean and log-variance by the side of the tokens they are for: of the image, or of the image at each side.

        With image_pixels, twice the channels: what feeds the scale follows, with a variance of nothing.
        """
        if supervision == "latent":
            return {sides[-1]: self.moments(images)}
        small = [F.interpolate(images, (self.config.factor * s,) * 2, mode="area") for s in sides]
        found = {s: self.moments(image) for s, image in zip(sides, small, strict=True)}
        if supervision == "image_pixels":
            fed = [torch.zeros_like(found[sides[0]][0]), *map(self.raised, small, sides[1:])]
            for (s, (mean, log_variance)), own in zip(found.items(), fed, strict=True):
                found[s] = torch.cat([mean, own], 1), torch.cat([log_variance, torch.full_like(own, NO_VARIANCE)], 1)
        return found

    def raised(self, images: Tensor, s: int) -> Tensor:
        """Images of any size → mean latents (B, z, h, w), not scaled, of the images raised to side s, bicubically."""
        pixels = (self.config.factor * s,) * 2
        return self.moments(F.interpolate(images, pixels, mode="bicubic", align_corners=False))[0]

    def from_moments(
        self, moments: Mapping[int, tuple[Tensor, Tensor]], sides: Sequence[int], sample: bool = True
    ) -> dict[int, Tensor]:
        """Latents drawn by torch's generator (or their means) → tokens of these sides, {s: (B, s², D)}.

        Of sides that have no moments of their own, the finest one's latents, resized by area: noise comes before that.
        """
        drawn = {s: self.latents(m, v, noise_like(m) if sample else None) for s, (m, v) in moments.items()}
        finest, patch = drawn[max(drawn)], self.config.patch
        return {s: to_tokens(drawn[s] if s in drawn else area(finest, s * patch), patch) for s in sides}

    def to_cache(self, images: Tensor, sides: ScaleSchedule, supervision: str) -> Tensor:
        """Means and log-variances (B, n) in fp16, of the finest side or of each: noise is fresh in every step."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_convolutions(self.tf32):
            found = self.moments_of(from_bytes(images), sides.sides, supervision)
        return torch.cat([x.flatten(1) for pair in found.values() for x in pair], dim=1).half().cpu()

    def from_cache(
        self, rows: Tensor, sides: ScaleSchedule, schedule: ScaleSchedule, supervision: str
    ) -> dict[int, Tensor]:
        z, patch, moments = self.config.z_channels * (1 + (supervision == "image_pixels")), self.config.patch, {}
        stored = sides.sides[-1:] if supervision == "latent" else sides.sides
        parts = rows.float().split([2 * z * (patch * s) ** 2 for s in stored], dim=1)
        for s, part in zip(stored, parts, strict=True):
            moments[s] = part.unflatten(1, (2, z, patch * s, patch * s)).unbind(1)
        return self.from_moments(moments, schedule.sides)  # type: ignore[arg-type]

    def known_of_images(self, images: Tensor, schedule: ScaleSchedule, supervision: str) -> KnownCodes:
        """Means of the latents."""
        moments = self.moments_of(images, schedule.sides, "latent" if supervision == "latent" else "image")
        return KnownCodes(self.from_moments(moments, schedule.sides, sample=False))

    def decode_at(self, codes: Mapping[int, Tensor], s: int, schedule: ScaleSchedule) -> Tensor:
        return self.decode_maps(self.pathway.maps(codes[s], s) / self.scaling)

    def decode_inputs(self, codes: Mapping[int, Tensor], i: int, schedule: ScaleSchedule) -> Tensor:
        tokens = torch.cat([self.pathway.own(codes[s]) for s in schedule.sides[:i]], dim=1)
        fed = self.pathway.inputs(F.pad(tokens, (0, 0, 0, schedule.total - tokens.shape[1])), schedule, first=i)
        return self.decode_at({schedule.sides[i]: fed[:, : schedule.lengths[i]]}, schedule.sides[i], schedule)

    def pixels(self, s: int, schedule: ScaleSchedule) -> int:
        return s * self.config.factor

    def quantise(self, images: Tensor, sides: Sequence[int]) -> Quantised:
        """The image of a drawn latent; the KL divergence of the posterior stands where VQ has its commitment."""
        down, luck = self.config.down_sampling, float(torch.rand(())) if self.equivariant else 1.0
        full = images.shape[-1] // down
        small = max(1, round(full * int(torch.randint(8, 32, ())) / 32)) if luck < 0.625 else full
        if 0.5 <= luck < 0.625:  # a quarter of what is not turned
            images = F.interpolate(images, (small * down,) * 2, mode="bilinear", antialias=True)
        mean, log_variance = self.moments(images, down)  # which need not make whole tokens
        latent = mean + (0.5 * log_variance).exp() * noise_like(mean)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        if luck < 0.5:
            turns = int(torch.randint(1, 4, ()))
            latent, images = turned(latent, small, turns), turned(images, small * down, turns)
        return Quantised([], [], [self.decode_maps(latent)], kl.new_zeros(()), kl, [images])


def noise_like(x: Tensor) -> Tensor:
    """Normal numbers of x's shape, in the order of its indices: randn_like's depend on how x lies in memory."""
    return torch.randn(x.shape, device=x.device)


def turned(maps: Tensor, s: int, quarters: int) -> Tensor:
    """Maps (B, C, h, w) resized bilinearly to side s, and turned by quarters."""
    return F.interpolate(maps, (s, s), mode="bilinear", antialias=True).rot90(quarters, (2, 3))


def to_tokens(maps: Tensor, patch: int) -> Tensor:
    """Maps (B, z, patch·s, patch·s) → tokens (B, s², z·patch²), each in the order channel, row, column."""
    return F.pixel_unshuffle(maps, patch).flatten(2).transpose(1, 2)


class LatentPathway(UpsamplingPathway):
    """The upsampling pathway of continuous tokens: a scale is fed with the latent of the scale before it.

    The detour, up to the finest side bicubically and from there down by area, is the released model's.
    """

    def __init__(self, patch: int, channels: int):
        self.patch, self.channels = patch, channels

    def embed(self, codes: Tensor) -> Tensor:
        """Tokens (B, n, D) as they are."""
        return codes

    def own(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, D) without what feeds them, which follows in those of image_pixels (B, n, 2D)."""
        return tokens[..., : self.channels * self.patch**2]

    def maps(self, tokens: Tensor, s: int) -> Tensor:
        """Tokens (B, s², D) → maps (B, z, patch·s, patch·s)."""
        return F.pixel_shuffle(self.own(tokens).transpose(1, 2).unflatten(2, (s, s)), self.patch)

    def shift(self, tokens: Tensor, i: int, schedule: ScaleSchedule) -> Tensor:
        """Tokens (B, s², D) of scale i → inputs (B, s'², D) of the next."""
        full, after = schedule.sides[-1] * self.patch, schedule.sides[i + 1] * self.patch
        maps = self.maps(tokens.float(), schedule.sides[i])
        if maps.shape[-1] != full:
            maps = F.interpolate(maps, size=(full, full), mode="bicubic", align_corners=False)
        return to_tokens(area(maps, after), self.patch)


class PixelPathway(LatentPathway):
    """The other reading of image supervision: a scale is fed with the picture of the one before, raised and encoded.

    In training that picture is the true image, shrunk, and its latents come with the tokens (B, L, 2D); of samples it
    is decoded here.
    """

    def __init__(self, vae: KLAutoencoder):
        super().__init__(vae.config.patch, vae.config.z_channels)
        self.vae = vae

    @torch.no_grad()
    def shift(self, tokens: Tensor, i: int, schedule: ScaleSchedule) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False), exact_convolutions():
            image = self.vae.decode_at({schedule.sides[i]: tokens.float()}, schedule.sides[i], schedule)
            return to_tokens(self.vae.raised(image, schedule.sides[i + 1]) * self.vae.scaling, self.patch)

    def inputs(self, tokens: Tensor, schedule: ScaleSchedule, truth: Tensor | None = None, first: int = 1) -> Tensor:
        own = self.own(tokens)
        if own.shape == tokens.shape:
            return super().inputs(tokens, schedule, truth, first)
        return tokens[:, schedule.offsets[first] :, own.shape[-1] :]
