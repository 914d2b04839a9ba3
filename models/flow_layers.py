"""The parts of FlowAR's stacks and of its head: RMS norms, rotary attention, gated FFN, the head's blocks.

Legend: B batch, H heads, L tokens of some scales, K those scales, d head size, C width, w width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import attend


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x over the root of its mean square (…, C), computed in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return normed if weight is None else normed * weight


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class GatedFFN(nn.Module):
    """C → ⌊8C/3⌋ → C, gated with exact GELU."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        hidden = int(width * 8 / 3)
        self.fc1_g, self.fc1_x = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


Rope = tuple[Tensor, Tensor]  # cosines and sines of rotary position embeddings (RoPE)


def rope_tables(sides: Sequence[int], full: int, size: int, device: torch.device) -> Rope:
    """Cosines and sines (L, size/2) of the rotary positions of all tokens of these sides, row-major.

    A token of a side-n scale stands at (full·row/n, full·column/n). The first half of the pairs turns with the row, the
    rest with the column.
    """
    frequencies = 10000 ** (-torch.arange(0, size // 2, 2, device=device).float() / (size // 2))  # (size/4,)
    parts = []
    for n in sides:
        place = torch.arange(n, device=device).float() * (full / n)
        angles = place[:, None] * frequencies  # (n, size/4)
        rows, columns = angles[:, None].expand(n, n, -1), angles[None].expand(n, n, -1)
        parts.append(torch.cat([rows, columns], dim=-1).flatten(0, 1))
    found = torch.cat(parts)
    return found.cos(), found.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x (B, H, L, d) with each pair of neighbouring channels turned."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, H, L, d/2)
    cos, sin = rope
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, L, d), q scaled → (B, H, L, d)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, width: int, heads: int, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope, attention: Attention) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        out = attention(scaled(apply_rope(q, rope)), apply_rope(k, rope), v)
        return F.dropout(self.proj(out.transpose(1, 2).flatten(2)), self.dropout, self.training)


class RotaryCrossAttention(nn.Module):
    """Multi-head attention of the tokens to conditions of the same places, with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, z: Tensor, rope: Rope, attention: Attention) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(z).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(scaled(apply_rope(q, rope)), apply_rope(k, rope), v)
        return self.proj(out.transpose(1, 2).flatten(2))


def scaled(q: Tensor) -> Tensor:
    """Queries over the root of the head's size: `attend` scales nothing."""
    return q / math.sqrt(q.shape[-1])


class WithinScales:
    """Full attention within each of several scales."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = list(lengths)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], dim=2)


class PlainBlock(nn.Module):
    """Self-attention and FFN, both modulated token by token."""

    def __init__(self, width: int):
        super().__init__()
        self.attn, self.mlp = RotarySelfAttention(width, width // 64, bias=False), GatedFFN(width)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, z: Tensor, c: Tensor, tau: Tensor, rope: Rope, attention: Attention) -> Tensor:
        """x (B, L, w) tokens, z (B, L, C) conditions, c (B, L, w) their embedding, tau (B, L, w) of tokens' times."""
        modulation = self.ada_lin(F.silu(c + tau)).chunk(6, dim=-1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + gate1 * self.attn(rms_norm(x) * (1 + scale1) + shift1, rope, attention)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class CrossBlock(nn.Module):
    """Self-attention modulated by the time, cross-attention to the conditions, an FFN modulated token by token."""

    def __init__(self, width: int):
        super().__init__()
        self.attn, self.mlp = RotarySelfAttention(width, width // 64, bias=False), GatedFFN(width)
        self.crossattn = RotaryCrossAttention(width, width // 64)
        self.norm2_1, self.norm2_2 = RMSNorm(width), RMSNorm(width)
        self.ada_lin_attn, self.ada_lin_mlp = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, z: Tensor, c: Tensor, tau: Tensor, rope: Rope, attention: Attention) -> Tensor:
        """See `PlainBlock`; C must be w."""
        gate, scale, shift = self.ada_lin_attn(F.silu(tau)).chunk(3, dim=-1)
        x = x + gate * self.attn(rms_norm(x) * (1 + scale) + shift, rope, attention)
        x = x + self.crossattn(self.norm2_1(x), self.norm2_2(z), rope, attention)
        gate, scale, shift = self.ada_lin_mlp(F.silu(c + tau)).chunk(3, dim=-1)
        return x + gate * self.mlp(rms_norm(x) * (1 + scale) + shift)


class TimeEmbedding(nn.Module):
    """Times (B, K) → (B, K, w), by sinusoids of the whole number ⌊1000·t⌋."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # The product is in fp32: in float64 a few exact cases, 0.65 for one, fall a whole number lower.
        whole = (t.float() * 1000).long().float()
        omega = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angles = whole.unsqueeze(-1) * omega  # (B, K, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class FinalLayer(nn.Module):
    """Modulated normalisation, and the projection to velocities."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(rms_norm(x) * (1 + scale) + shift)
