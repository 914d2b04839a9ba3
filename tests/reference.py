"""Slow, obvious forms of the two models, written from the description of the released ones alone.

Functions of a state dict: no modules of the project, no cache, a dense mask, one scale after the other.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

StateDict = dict[str, Tensor]


def codebook_of(w: StateDict) -> Tensor:
    rows = w["quantize.embedding.weight"]
    return rows / rows.norm(dim=1, keepdim=True)


def conv(w: StateDict, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def norm_swish(w: StateDict, name: str, x: Tensor, swish: bool = True) -> Tensor:
    x = F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    return x * torch.sigmoid(x) if swish else x


def res_block(w: StateDict, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", norm_swish(w, f"{name}.norm1", x), padding=1)
    h = conv(w, f"{name}.conv2", norm_swish(w, f"{name}.norm2", h), padding=1)
    return h + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention_block(w: StateDict, name: str, x: Tensor) -> Tensor:
    h = norm_swish(w, f"{name}.norm", x, swish=False)
    b, c, height, width = x.shape
    q, k, v = (conv(w, f"{name}.{n}", h).reshape(b, c, -1) for n in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c), dim=2)
    out = torch.einsum("bij,bcj->bci", weights, v).reshape(b, c, height, width)
    return x + conv(w, f"{name}.proj_out", out)


def levels(w: StateDict, part: str, x: Tensor) -> Tensor:
    i = 0
    while f"{part}.conv_blocks.{i}.res.0.norm1.weight" in w:
        level, j = f"{part}.conv_blocks.{i}", 0
        while f"{level}.res.{j}.norm1.weight" in w:
            x = res_block(w, f"{level}.res.{j}", x)
            if f"{level}.attn.{j}.norm.weight" in w:
                x = attention_block(w, f"{level}.attn.{j}", x)
            j += 1
        if f"{level}.downsample.conv.weight" in w:
            x = conv(w, f"{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        if f"{level}.upsample.conv.weight" in w:
            x = conv(w, f"{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        i += 1
    return x


def middle(w: StateDict, part: str, x: Tensor) -> Tensor:
    x = res_block(w, f"{part}.mid.0", x)
    return res_block(w, f"{part}.mid.2", attention_block(w, f"{part}.mid.1", x))


def encode(w: StateDict, images: Tensor) -> Tensor:
    x = middle(w, "encoder", levels(w, "encoder", conv(w, "encoder.conv_in", images, padding=1)))
    x = conv(w, "encoder.conv_out", norm_swish(w, "encoder.norm_out", x), padding=1)
    return conv(w, "quant_conv", x)


def codes_of(w: StateDict, latent: Tensor, s: int) -> Tensor:
    z = F.adaptive_avg_pool2d(latent, s).flatten(2).transpose(1, 2)
    z = z / z.norm(dim=2, keepdim=True)
    return torch.cdist(z, codebook_of(w)[None], compute_mode="donot_use_mm_for_euclid_dist").argmin(2)


def decode(w: StateDict, codes: Tensor, s: int) -> Tensor:
    x = codebook_of(w)[codes].reshape(len(codes), s, s, -1).permute(0, 3, 1, 2)
    x = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", x), padding=1)
    x = levels(w, "decoder", middle(w, "decoder", x))
    return conv(w, "decoder.conv_out", norm_swish(w, "decoder.norm_out", x), padding=1)


def inputs_of(codebook: Tensor, codes: list[Tensor], sides: tuple[int, ...]) -> list[Tensor]:
    """Inputs of the scales after each of `codes`."""
    parts = []
    for c, s, after in zip(codes, sides, sides[1:], strict=False):
        grid = codebook[c].reshape(len(c), s, s, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(after, after), mode="bicubic")
        parts.append(grid.permute(0, 2, 3, 1).reshape(len(c), after * after, -1))
    return parts


def forward(w: StateDict, labels: Tensor, inputs: list[Tensor], sides: tuple[int, ...]) -> Tensor:
    """Logits of the first 1 + len(inputs) scales, with a dense mask."""
    sides = sides[: 1 + len(inputs)]
    width, heads = w["pos_start"].shape[2], w["blocks.0.attn.scale_mul_1H11"].shape[1]
    condition = w["class_emb.weight"][labels]
    tokens = [condition[:, None] + w["pos_start"]]
    tokens += [F.linear(u, w["word_embed.weight"], w["word_embed.bias"]) for u in inputs]
    positions = [F.adaptive_avg_pool2d(w["pos_1LC"], s).reshape(1, width, s * s).transpose(1, 2) for s in sides]
    x = torch.cat([t + p for t, p in zip(tokens, positions, strict=True)], dim=1)
    scale = torch.tensor([i for i, s in enumerate(sides) for _ in range(s * s)])
    visible = scale[:, None] >= scale[None, :]
    silu = condition * torch.sigmoid(condition)

    def modulated(x: Tensor, s: Tensor, b: Tensor) -> Tensor:
        mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + 1e-6) * (1 + s) + b

    i = 0
    while f"blocks.{i}.attn.mat_qkv.weight" in w:
        p = f"blocks.{i}"
        ada = F.linear(silu, w[f"{p}.ada_lin.1.weight"], w[f"{p}.ada_lin.1.bias"]).reshape(-1, 1, 6, width)
        g1, g2, s1, s2, b1, b2 = (ada[:, :, n] for n in range(6))
        h = modulated(x, s1, b1)
        query, key, value = (h @ m.T for m in w[f"{p}.attn.mat_qkv.weight"].chunk(3))
        query, value = query + w[f"{p}.attn.q_bias"], value + w[f"{p}.attn.v_bias"]
        query, key, value = (t.reshape(len(t), -1, heads, 64).transpose(1, 2) for t in (query, key, value))
        temperature = w[f"{p}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        query = query / query.norm(dim=3, keepdim=True) * temperature
        key = key / key.norm(dim=3, keepdim=True)
        scores = (query @ key.transpose(2, 3)).masked_fill(~visible, -math.inf)
        out = (scores.softmax(3) @ value).transpose(1, 2).reshape(x.shape)
        x = x + g1 * F.linear(out, w[f"{p}.attn.proj.weight"], w[f"{p}.attn.proj.bias"])
        h = F.linear(modulated(x, s2, b2), w[f"{p}.ffn.fc1.weight"], w[f"{p}.ffn.fc1.bias"])
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + g2 * F.linear(h, w[f"{p}.ffn.fc2.weight"], w[f"{p}.ffn.fc2.bias"])
        i += 1
    ada = F.linear(silu, w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"]).reshape(-1, 1, 2, width)
    return F.linear(modulated(x, ada[:, :, 0], ada[:, :, 1]), w["head.weight"], w["head.bias"])


def greedy(w: StateDict, codebook: Tensor, labels: Tensor, sides: tuple[int, ...], cfg: float) -> list[Tensor]:
    """Greedy tokens of every scale under ramp guidance, recomputing everything at each scale."""
    null = torch.full_like(labels, len(w["class_emb.weight"]) - 1)
    codes: list[Tensor] = []
    for i, s in enumerate(sides):
        inputs = inputs_of(codebook, codes, sides)
        cond, uncond = (forward(w, who, inputs, sides)[:, -s * s :] for who in (labels, null))
        t = cfg * i / min(len(sides) - 1, 9)
        codes.append(((1 + t) * cond - t * uncond).argmax(2))
    return codes
