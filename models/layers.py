"""The transformer's parts: scale-causal attention with an explicit KV cache, FFN, adaptive LayerNorm.

Legend: B batch, L tokens, C width, H heads, d head size (64).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.scales import ScaleSchedule

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, L, d) → (B, H, L, d)

# Scales within the first COARSE_TOKENS tokens share one small masked product. Each finer scale attends, without a
# mask, to the keys up to its own: 1.5 times faster on a CPU than one dense mask, forward and backward.
COARSE_TOKENS = 160


class ScaleCausalAttention:
    """Attention over all tokens of a schedule at once: a token sees its own scale and all coarser ones."""

    def __init__(self, schedule: ScaleSchedule, device: torch.device, dropout: float = 0.0):
        self.dropout = dropout
        ends = schedule.offsets[1:]
        coarse = max(1, sum(end <= COARSE_TOKENS for end in ends))
        self.lengths = [ends[coarse - 1], *schedule.lengths[coarse:]]  # of the coarse group, then of each finer scale
        self.mask: Tensor | None = None  # (n, n) of the coarse group: True where a row may see a column
        if coarse > 1:
            position = torch.arange(self.lengths[0], device=device)
            scale = torch.stack([position >= end for end in ends[: coarse - 1]]).sum(0)
            self.mask = scale[:, None] >= scale[None, :]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = tuple(accumulate(self.lengths))
        seen = zip(q.split(self.lengths, dim=2), Prefixes.apply(k, ends), Prefixes.apply(v, ends), strict=True)
        out = [attend(*part, None if i else self.mask, self.dropout) for i, part in enumerate(seen)]
        # Kernels write (B, L, H, d): joined along L as it lies in memory, it is (B, L, C) without a copy.
        return torch.cat([x.transpose(1, 2) for x in out], dim=1).transpose(1, 2)


class Prefixes(torch.autograd.Function):
    """x (B, H, L, d) → views of its first tokens, one for each of some ends.

    Their gradients are added up in one tensor; those of slices would be padded to full length each.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x[:, :, :end] for end in ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        *shorter, whole = gradients
        total = whole.clone()
        for end, gradient in zip(ctx.ends, shorter, strict=False):
            total[:, :, :end] += gradient
        return total, None


class CachedAttention:
    """Attention of one scale at a time: appends its keys and values, then attends to all that are there."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None  # (B, H, capacity, d), allocated by the first scale
        self.v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.k is None:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        start, end = self.length, self.length + k.shape[2]
        assert end <= self.capacity, f"the cache holds {self.capacity} tokens, not {end}"
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        self.length = end
        return attend(q, self.k[:, :, :end], self.v[:, :, :end])


@dataclass(frozen=True)
class Kernel:
    """An optional attention kernel over (B, L, H, d), and the CUDA compute capabilities that it is built for."""

    name: str
    attention: Attend
    capability: dict[torch.dtype, tuple[int, int]]  # the least
    before: tuple[int, int] = (sys.maxsize, 0)  # the first beyond


def find_kernel() -> Kernel | None:
    """flash-attn or xformers, whichever is installed and loads."""
    try:
        from flash_attn import flash_attn_func

        needs = {torch.float16: (8, 0), torch.bfloat16: (8, 0)}  # Ampere, Ada and Hopper
        return Kernel("flash-attn", partial(flash_attn_func, softmax_scale=1.0), needs, before=(10, 0))
    except (ImportError, OSError):  # OSError: its library does not fit this machine
        pass
    try:
        from xformers.ops import memory_efficient_attention

        needs = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}  # Volta; bf16 from Ampere on
        return Kernel("xformers", partial(memory_efficient_attention, scale=1.0), needs)
    except (ImportError, OSError):
        return None


KERNEL = find_kernel()


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The optional kernel, where the card can run it: in half precision. Else PyTorch's own does everything."""
    if KERNEL is None or device.type != "cuda" or dtype not in KERNEL.capability:
        return None
    card = torch.cuda.get_device_capability(device)
    return KERNEL if KERNEL.capability[dtype] <= card < KERNEL.before else None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """q arrives scaled, so the softmax scale is 1. `dropout` is of the attention weights."""
    kernel = kernel_for(q.device, q.dtype)
    if kernel is not None and mask is None and not dropout:
        return kernel.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)


class SelfAttention(nn.Module):
    """Multi-head attention with L2-normalised queries and keys and a learned temperature a head."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, C) → q, k, v (B, H, L, d), normalised, q times the temperature."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias)  # (B, L, 3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        temperature = self.scale_mul_1H11.clamp_max(math.log(100)).exp()
        return (q * (temperature / length(q))).to(v.dtype), (k / length(k)).to(v.dtype), v

    def merge(self, out: Tensor) -> Tensor:
        """Attention output (B, H, L, d) → (B, L, C)."""
        return self.proj(out.transpose(1, 2).flatten(2))


def length(x: Tensor) -> Tensor:
    """L2 norms over the last dimension (…, 1), in fp32 and never 0."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)


class GeluLinear(torch.autograd.Function):
    """h (…, D) → linear(GELU(h)), the tanh form. Backward makes GELU(h) again instead of keeping it."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h.to(dtype), approximate="tanh"), weight.to(dtype), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        own, rows = h.to(gradient.dtype), gradient.flatten(0, -2)
        d_weight = rows.T @ F.gelu(own, approximate="tanh").flatten(0, -2)
        d_h = torch.ops.aten.gelu_backward(gradient @ weight.to(gradient.dtype), own, approximate="tanh")
        return d_h.to(h.dtype), d_weight.to(weight.dtype), rows.sum(0, dtype=torch.float32).to(weight.dtype)


class FFN(nn.Module):
    """C → 4C → C with the tanh form of GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)


class AdaLinear(nn.Sequential):
    """Condition (B, C) → n modulation vectors (B, 1, n, C). Named as in released files: `ada_lin.1` is the Linear."""

    def __init__(self, width: int, n: int):
        super().__init__(nn.SiLU(), nn.Linear(width, n * width))
        self.n = n

    def forward(self, condition: Tensor) -> Tensor:
        return super().forward(condition).unflatten(1, (1, self.n, -1))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without affine, then the condition's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Block(nn.Module):
    """Attention and FFN, each modulated, gated and dropped as a path with probability `drop_path`.

    Without `own_modulation` it has what it adds to a modulation that all blocks share (`ada_gss`).
    """

    def __init__(self, width: int, heads: int, drop_path: float, own_modulation: bool = True):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ffn = FFN(width)
        self.own_modulation = own_modulation
        if own_modulation:
            self.ada_lin = AdaLinear(width, 6)
        else:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        self.drop_path = drop_path

    def forward(self, x: Tensor, modulation: Tensor, attention: Attend) -> Tensor:
        """x (B, L, C), modulation (B, 1, 6, C) → (B, L, C)."""
        modulation = modulation if self.own_modulation else modulation + self.ada_gss
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)  # (B, 1, C) each
        q, k, v = self.before_attention(x, scale1, shift1)
        gate1, gate2 = self.keep_path(gate1), self.keep_path(gate2)
        return self.after_attention(x, attention(q, k, v), gate1, gate2, scale2, shift2)

    # Everything but attention, whose products depend on the schedule, lies in these two.

    def before_attention(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.project(modulate(x, scale, shift))

    def after_attention(
        self, x: Tensor, out: Tensor, gate1: Tensor, gate2: Tensor, scale: Tensor, shift: Tensor
    ) -> Tensor:
        x = torch.addcmul(x, gate1, self.attn.merge(out))
        return torch.addcmul(x, gate2, self.ffn(modulate(x, scale, shift)))

    def compile_parts(self) -> None:
        """Compile all but attention, once for any number of tokens."""
        self.before_attention = torch.compile(self.before_attention, dynamic=True)  # type: ignore[method-assign]
        self.after_attention = torch.compile(self.after_attention, dynamic=True)  # type: ignore[method-assign]

    def keep_path(self, gate: Tensor) -> Tensor:
        """Stochastic depth: the branch of an image is dropped, or kept and scaled so that its mean stays."""
        if not self.training or self.drop_path == 0:
            return gate
        keep = 1 - self.drop_path
        return gate * gate.new_empty(len(gate), 1, 1).bernoulli_(keep).div_(keep)


class HeadNorm(nn.Module):
    """The modulated LayerNorm before the head."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = AdaLinear(width, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.unbind(2)
        return modulate(x, scale, shift)
