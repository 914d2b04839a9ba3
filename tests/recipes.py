"""Weights and images of golden data, made again from the recipes that made them.

A recipe: normals of a seeded generator, drawn in the order of the sorted keys, each turned into a value by its key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.flexvar import sinusoids

Value = Callable[[str, torch.Size, Tensor], Tensor]

# Buffers that keep their values and draw nothing.
KEPT = ("attn_bias_for_masking", "zero_k_bias", "codebook_used", "layout", "lvl_1L", "ema_vocab_hit_SV")


@torch.no_grad()
def fill(module: nn.Module, seed: int, value: Value) -> nn.Module:
    """Fill a model by a recipe, and put it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    for key in sorted(state):
        if not key.endswith(KEPT):
            noise = torch.randn(state[key].shape, generator=generator)
            state[key].copy_(value(key, state[key].shape, noise))
    return module.eval()


def flexvar_value(key: str, shape: torch.Size, noise: Tensor) -> Tensor:
    """FlexVAR's and its tokenizer's."""
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * noise
    if key.endswith("scale_mul_1H11"):
        return 1 + 0.5 * noise
    if key == "pos_1LC":
        return sinusoids(shape[1], shape[2]) + 0.02 * noise
    if key.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 4:
        return noise * 1.2 / (shape[1] * shape[2] * shape[3]) ** 0.5
    if key == "quantize.embedding.weight":
        return noise
    return noise / shape[1] ** 0.5 if len(shape) == 2 else 0.08 * noise


def var_value(key: str, shape: torch.Size, noise: Tensor) -> Tensor:
    """VAR's and its tokenizer's."""
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * noise
    if key.endswith("scale_mul_1H11"):
        found = 1 + 0.5 * noise
        if key.startswith("blocks.0."):
            found[0, 0] += 4  # over ln 100, so that the clamp is at work
        return found
    if key in ("quantize.embedding.weight", "class_emb.weight", "lvl_embed.weight"):
        return 0.5 * noise
    if key in ("pos_start", "pos_1LC"):
        return 0.6 * noise
    if key.endswith(("ada_lin.1.bias", "ada_gss")):
        return 0.2 * noise
    if key.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 4:
        return noise * 1.2 / (shape[1] * shape[2] * shape[3]) ** 0.5
    return noise / shape[1] ** 0.5


def flowar_value(key: str, shape: torch.Size, noise: Tensor) -> Tensor:
    """FlowAR's and the KL autoencoders'."""
    if len(shape) == 1 and key.endswith("weight"):
        return 1 + 0.1 * noise
    if key.endswith("bias"):
        return 0.05 * noise
    if key.endswith("pos_embed_learned"):
        return 0.5 * noise
    if key == "class_emb.weight":
        return noise
    if len(shape) == 4:
        return noise * 1.2 / (shape[1] * shape[2] * shape[3]) ** 0.5
    return noise / shape[1] ** 0.5


def plain_images(seed: int, batch: int, side: int) -> Tensor:
    """Uniform noise (B, 3, side, side) in [-1, 1]."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blocky_images(seed: int, batch: int, side: int) -> Tensor:
    """Coarse noise and fine noise (B, 3, side, side) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.rand(batch, 3, n, n, generator=generator) * 2 - 1 for n in (8, side))
    blocks = coarse.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    return 0.6 * blocks + 0.4 * fine
