"""Encoder and decoder of VQGAN under the names of latent-diffusion: VAR's tokenizer and the KL autoencoders have them.

Legend: B batch, C channels, H × W pixels, h × w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.vqvae import Downsample, ResBlock, Upsample, count, norm

MakeAttention = Callable[[int], nn.Module]  # from the number of channels


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where it has any, then the change of scale."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: MakeAttention | None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(attention(c_out) for _ in range(blocks if attention else 0))  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for change in ("downsample", "upsample"):
            if hasattr(self, change):
                x = getattr(self, change)(x)
        return x


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int, attention: MakeAttention):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) → features (B, channels, h, w)."""

    def __init__(
        self, base: int, mults: Sequence[int], blocks: int, channels: int, attention: MakeAttention, at: Sequence[int]
    ):
        """`at`: numbers of the levels with attention, from the finest, 0; the middle has it, too."""
        super().__init__()
        widths = [base * m for m in mults]
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList(
            Level(c_in, c_out, blocks, attention if i in at else None)
            for i, (c_in, c_out) in enumerate(zip([base, *widths[:-1]], widths, strict=True))
        )
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1], attention)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features (B, channels, h, w) → images (B, 3, H, W): one residual block more a level; level 0 is the finest."""

    def __init__(
        self, base: int, mults: Sequence[int], blocks: int, channels: int, attention: MakeAttention, at: Sequence[int]
    ):
        super().__init__()
        widths = [base * m for m in mults]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attention)
        self.up = nn.ModuleList(
            Level(c_in, c_out, blocks + 1, attention if i in at else None)
            for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(width)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def network_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of an encoder of this layout, read off a state dict. Raises KeyError for what is missing."""
    base = weights["encoder.conv_in.weight"].shape[0]
    levels = count(weights, lambda i: f"encoder.down.{i}.block.0.conv1.weight")
    widths = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "base_width": base,
        "width_mult": tuple(width // base for width in widths),
        "res_blocks": count(weights, lambda i: f"encoder.down.0.block.{i}.conv1.weight"),
    }


def levels_with_attention(weights: Mapping[str, Tensor], part: str) -> tuple[int, ...]:
    """Numbers of the levels with attention of "encoder.down" or "decoder.up"."""
    levels = count(weights, lambda i: f"{part}.{i}.block.0.conv1.weight")
    return tuple(i for i in range(levels) if f"{part}.{i}.attn.0.norm.weight" in weights)
