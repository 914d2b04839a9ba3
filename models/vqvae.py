"""The multi-scale VQVAE tokenizer of FlexVAR, with the released key names.

Legend: B batch, C channels, H × W pixels, h × w latent sides, D codebook width, V codebook rows, s side of a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.scales import ScaleSchedule, UpsamplingPathway, shift_up
from models.tokenizer import Quantised, Tokenizer, area, nearest_rows


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a tokenizer; the defaults are FlexVAE.pth (72.0 M parameters, 16× down-sampling)."""

    base_width: int = 128
    width_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 8912
    codebook_dim: int = 32

    def __post_init__(self):
        object.__setattr__(self, "width_mult", tuple(self.width_mult))  # a list, where it was JSON

    @property
    def factor(self) -> int:
        """Pixels of an image side for each latent."""
        return 2 ** (len(self.width_mult) - 1)

    def unpublished(self) -> VQVAEConfig:
        """Of weights of our own training: without what is known of published ones of these sizes."""
        return self

    def build(self) -> Tokenizer:
        """A tokenizer of these sizes."""
        return VQVAE(self)

    # What the other files ask of a tokenizer: see `models/generators.py`.
    pathway: ClassVar[str] = "upsampling"  # what its codes feed: see `models/scales.py`
    tied_to_schedule: ClassVar[bool] = False  # True where codes of one schedule say nothing about another
    unread: ClassVar[tuple[str, ...]] = ("kl", "equivariant")  # flags of train_tokenizer.py that have no effect on it

    @classmethod
    def from_flags(cls, flags: Any) -> VQVAEConfig:
        """The config that train_tokenizer.py's flags name."""
        names = ("base_width", "width_mult", "res_blocks", "z_channels", "codebook_size", "codebook_dim")
        return cls(**{name: getattr(flags, name) for name in names})

    @classmethod
    def recognises(cls, weights: Mapping[str, Tensor]) -> bool:
        """True for the state dict of such a tokenizer."""
        return "encoder.conv_blocks.0.res.0.conv1.weight" in weights

    @classmethod
    def adapted(cls, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A state dict of such a file, under the names that are used here."""
        return weights

    @classmethod
    def sizes_of(cls, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sizes, read off the tensors of a state dict. Raises KeyError for what is missing."""
        pattern = "encoder.conv_blocks.{}.res.{}.conv1.weight"
        base = weights["encoder.conv_in.weight"].shape[0]
        levels = count(weights, lambda i: pattern.format(i, 0))
        rows, dim = weights["quantize.embedding.weight"].shape
        return {
            "base_width": base,
            "width_mult": tuple(weights[pattern.format(i, 0)].shape[0] // base for i in range(levels)),
            "res_blocks": count(weights, lambda i: pattern.format(0, i)),
            "z_channels": weights["encoder.conv_out.weight"].shape[0],
            "codebook_size": rows,
            "codebook_dim": dim,
        }


def count(weights: Mapping[str, Tensor], name: Callable[[int], str]) -> int:
    """Number of name(0), name(1), … there are."""
    n = 0
    while name(n) in weights:
        n += 1
    return n


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
        return nearest_rows(z, self.rows())


class VQVAE(Tokenizer):
    """FlexVAR's: the codes of a side are those of the latent resized to it, and decode by themselves."""

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
        return UpsamplingPathway(self.codebook)

    @staticmethod
    def resize(latent: Tensor, s: int) -> Tensor:
        """Latent (B, D, h, w) → its L2-normalised vectors at side s (B, s², D), by area."""
        return F.normalize(area(latent, s).flatten(2).transpose(1, 2), dim=-1)

    def codes(self, latent: Tensor, s: int) -> Tensor:
        """Latent (B, D, h, w) → codes of side s (B, s²) int64."""
        return self.quantize.nearest(self.resize(latent, s))

    def codes_of_images(self, images: Tensor, sides: Sequence[int], supervision: str) -> dict[int, Tensor]:
        factor = self.config.factor
        if supervision == "latent":
            latent = self.encode(images)
            return {s: self.codes(latent, s) for s in sides}
        small = {s: F.interpolate(images, (factor * s, factor * s), mode="area") for s in sides}
        return {s: self.codes(self.encode(image), s) for s, image in small.items()}

    def decode_at(self, codes: Mapping[int, Tensor], s: int, schedule: ScaleSchedule) -> Tensor:
        return self.decode(codes[s], s)

    def decode_inputs(self, codes: Mapping[int, Tensor], i: int, schedule: ScaleSchedule) -> Tensor:
        before, s = schedule.sides[i - 1 : i + 1]
        return self.decode_vectors(F.normalize(shift_up(codes[before], self.codebook, before, s), dim=-1), s)

    def pixels(self, s: int, schedule: ScaleSchedule) -> int:
        return s * self.config.factor

    def decode(self, codes: Tensor, s: int) -> Tensor:
        """Codes of side s (B, s²) → images (B, 3, factor·s, factor·s), raw: not clamped to [-1, 1]."""
        return self.decode_vectors(F.embedding(codes, self.codebook), s)

    def decode_vectors(self, vectors: Tensor, s: int) -> Tensor:
        """Normalised vectors (B, s², D) → images (B, 3, factor·s, factor·s), raw."""
        return self.decode_maps(vectors.transpose(1, 2).unflatten(2, (s, s)))  # (B, D, s, s)

    def quantise(self, images: Tensor, sides: Sequence[int]) -> Quantised:
        latent, found = self.encode(images), Quantised([], [], [], images.new_zeros(()), images.new_zeros(()))
        codebook, commitment = [], []
        for s in sides:
            z = self.resize(latent, s)  # (B, s², D)
            codes = self.quantize.nearest(z)
            rows = F.embedding(codes, self.codebook)
            codebook.append(F.mse_loss(rows, z.detach()))
            commitment.append(F.mse_loss(z, rows.detach()))
            found.codes.append(codes)
            found.vectors.append(z.flatten(0, 1))
            found.images.append(self.decode_vectors(z + (rows - z).detach(), s))
        return found._replace(codebook=torch.stack(codebook).mean(), commitment=torch.stack(commitment).mean())
