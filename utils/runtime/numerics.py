"""The precision that models work in, and the seed of each piece of a step."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

import torch


class Precision:
    """fp32, bf16 or fp16 autocast, and the loss scaler that fp16 needs."""

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bf16" if has_bf16 else "fp32"
        self.name = name
        self.device = device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self, cache: bool = True) -> AbstractContextManager:
        """`cache=False` is for a pass without gradient among passes with one: older releases of torch keep the weights
        that such a pass casts, and the others would find them without gradient."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32", cache_enabled=cache)


def cpu_has_bf16() -> bool:
    """True for a CPU with instructions for products in bf16, where --precision bf16 pays."""
    has: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def derive_seed(*key: object) -> int:
    """A 63-bit seed from anything printable, the same on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
