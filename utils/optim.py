"""Parameter groups, the learning rate, precision, and the seed of each piece of a step."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from utils.config import OptimConfig
from utils.distributed import local, shared_like, whole

HOLD = 0.05  # of the run at the peak before the learning rate falls


def make_optimizer(models: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) with weight decay on matrices only: not on 1-D parameters, nor on those in a model's `no_decay`
    (positions, temperatures)."""
    decay, plain = [], []
    for model in models:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim >= 2 and not name.endswith(getattr(model, "no_decay", ()))
                (decay if is_matrix else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": config.twd}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put a checkpoint's moments back, this rank's share where the parameters are sharded."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        for name, x in moments.items():
            moments[name] = shared_like(x, parameters[i]) if x.ndim else x  # the count of steps is a number
    optimizer.load_state_dict(state)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay  # what the command says, not what the checkpoint says


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Linear warm-up over the first `wp` of the run, flat for 5 % of it, then linear to `wpe` of the peak."""
    warm = config.wp * total
    if step < warm:
        return config.lr * (0.005 + 0.995 * step / warm)
    progress = (step - warm) / max(total - 1 - warm, 1)  # 0 … 1 after the warm-up
    fall = max(0.0, (progress - HOLD) / (1 - HOLD))
    return config.lr * (1 - (1 - config.wpe) * fall)


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


def derive_seed(*key: object) -> int:
    """A 63-bit seed from anything printable, the same on every platform."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class MovingAverage:
    """A copy of a model whose weights follow the model's: average ← decay·average + (1 - decay)·weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        average, current = ([local(p) for p in m.parameters()] for m in (self.model, model))
        torch._foreach_lerp_(average, current, 1 - self.decay)


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scale the accumulated gradients down to a norm of `limit` (0: as they are). Returns their norm before that."""
    return whole(nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf")))


def apply_gradients(optimizer: torch.optim.Optimizer, precision: Precision, skip: torch.Tensor) -> None:
    """One optimiser step, unless `skip` is 1.0: decided on the device, as a gradient scaler does it."""
    if not precision.scaler.is_enabled():  # an enabled one finds out itself, from the gradients
        optimizer.found_inf = skip
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
