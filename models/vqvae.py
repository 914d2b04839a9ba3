"""The multi-scale VQVAE tokenizer of FlexVAR, with the released key names.

Legend: B batch, C channels, H × W pixels, h × w latent sides, D codebook width, V codebook rows, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.scales import UpsamplingPathway

NEAREST_AT_ONCE = 1024  # vectors compared with the whole codebook at a time
CACHED = 2**23  # values of a feature map that fit into a CPU's cache


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a tokenizer; the defaults are FlexVAE.pth (72.0 M parameters, 16× down-sampling)."""

    base_width: int = 128
    width_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 8912
    codebook_dim: int = 32

    @property
    def factor(self) -> int:
        """Pixels of an image side for each latent."""
        return 2 ** (len(self.width_mult) - 1)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, which also takes one value a channel and image (it becomes the bias), whatever the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def norm(channels: int) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1×1 convolution bridges unequal widths."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h·w, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and below


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the coarsest, then the change of scale."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, change: str | None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        if change == "down":
            self.downsample = Downsample(c_out)
        elif change == "up":
            self.upsample = Upsample(c_out)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        for i, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[i](x)
        if self.change is None:
            return x
        return self.downsample(x) if self.change == "down" else self.upsample(x)


def middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResBlock(channels, channels), AttnBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """Images (B, 3, H, W) → features (B, z_channels, h, w)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.base_width * m for m in config.width_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c_out, config.res_blocks, attention=i == last, change=None if i == last else "down")
            for i, (c_in, c_out) in enumerate(zip([config.base_width, *widths[:-1]], widths, strict=True))
        )
        self.mid = middle(widths[-1])
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in [*self.conv_blocks, *self.mid]:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) → images (B, 3, H, W): the encoder mirrored, one residual block more a level."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.base_width * m for m in reversed(config.width_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(c_in, c_out, config.res_blocks + 1, attention=i == 0, change=None if i == last else "up")
            for i, (c_in, c_out) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in [*self.mid, *self.conv_blocks]:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook. An embedding, everywhere, is the L2-normalised row."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        bound = 1 / config.codebook_size
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.register_buffer("codebook_used", torch.zeros(65536))  # in released files; nothing reads it

    def rows(self) -> Tensor:
        """The normalised codebook (V, D)."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Normalised vectors (…, D) → index of the nearest row (…,) by squared distance, the first on a tie."""
        with torch.autocast(z.device.type, enabled=False):  # half precision would choose other rows
            rows, flat = self.rows().float(), z.flatten(0, -2).float()
            squares, found = rows.square().sum(1), []
            for part in flat.split(NEAREST_AT_ONCE):
                distance = part.square().sum(1, keepdim=True) + squares
                found.append(torch.addmm(distance, part, rows.T, alpha=-2).argmin(dim=1))
            return torch.cat(found).view(z.shape[:-1])


class VQVAE(nn.Module):
    """Images in [-1, 1] ↔ codes of any side."""

    def __init__(self, config: VQVAEConfig | None = None):
        super().__init__()
        self.config = config = config or VQVAEConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """The normalised codebook (V, D)."""
        return self.quantize.rows()

    @property
    def pathway(self) -> UpsamplingPathway:
        """The pathway of its codes: they feed the next scale."""
        return UpsamplingPathway(self.codebook)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → latent (B, D, H / factor, W / factor)."""
        factor = self.config.factor
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(f"image sides must be multiples of {factor}, got {tuple(images.shape[-2:])}")
        parts = images.split(self.at_once(images, images.shape[-2:].numel()))
        return torch.cat([self.quant_conv(self.encoder(part)) for part in parts])

    @staticmethod
    def resize(latent: Tensor, s: int) -> Tensor:
        """Latent (B, D, h, w) → its L2-normalised vectors at side s (B, s², D), by area."""
        if latent.shape[-2:] != (s, s):
            latent = F.interpolate(latent, size=(s, s), mode="area")
        return F.normalize(latent.flatten(2).transpose(1, 2), dim=-1)

    def codes(self, latent: Tensor, s: int) -> Tensor:
        """Latent (B, D, h, w) → codes of side s (B, s²) int64."""
        return self.quantize.nearest(self.resize(latent, s))

    @torch.no_grad()
    def tokenize(self, images: Tensor, sides: Sequence[int], supervision: str = "latent") -> dict[int, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] → their codes at these sides, {s: (B, s²)}.

        A scale's codes come from the image's latent, resized by area to the scale ("latent"), or from the latent of the
        image resized to the scale's resolution ("image"). In full fp32, whatever precision the caller works in.
        """
        with torch.autocast(images.device.type, enabled=False), exact_convolutions():
            images, factor = images.float(), self.config.factor
            if supervision == "latent":
                latent = self.encode(images)
                return {s: self.codes(latent, s) for s in sides}
            small = {s: F.interpolate(images, (factor * s, factor * s), mode="area") for s in sides}
            return {s: self.codes(self.encode(image), s) for s, image in small.items()}

    def decode_at(self, codes: Mapping[int, Tensor], s: int) -> Tensor:
        """Codes of all sides up to s, {side: (B, side²)} → images (B, 3, factor·s, factor·s), raw: see `decode`."""
        return self.decode(codes[s], s)

    def decode(self, codes: Tensor, s: int) -> Tensor:
        """Codes of side s (B, s²) → images (B, 3, factor·s, factor·s), raw: not clamped to [-1, 1]."""
        return self.decode_vectors(F.embedding(codes, self.codebook), s)

    def decode_vectors(self, vectors: Tensor, s: int) -> Tensor:
        """Normalised vectors (B, s², D) → images (B, 3, factor·s, factor·s), raw."""
        maps = vectors.transpose(1, 2).unflatten(2, (s, s))  # (B, D, s, s)
        parts = maps.split(self.at_once(maps, (s * self.config.factor) ** 2))
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def at_once(self, x: Tensor, pixels: int) -> int:
        """Number of images of x (B, …) to put through the network at a time: on a CPU, what its cache holds."""
        return len(x) if x.device.type != "cpu" else max(1, CACHED // (pixels * self.config.base_width))


def exact_convolutions() -> AbstractContextManager:
    """Convolutions in full fp32 on a GPU, whose default is TF32: for codes and features that must not depend on it."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] → uint8, rounded, on the CPU."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
